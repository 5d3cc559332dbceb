"""A run: what it is made of, its steps, and how it ends."""
