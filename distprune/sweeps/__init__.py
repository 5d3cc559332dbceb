"""Many runs by one file: which there are, what they came to, and how they are carried out."""
