"""Which weights to remove, how many, when, and on which rank."""
