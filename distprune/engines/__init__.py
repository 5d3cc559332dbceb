"""DeepSpeed engines: built, fed and evaluated."""
