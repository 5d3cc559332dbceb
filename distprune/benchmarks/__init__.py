"""What pruning costs on the machine at hand, by ratio to what cannot be avoided there."""
