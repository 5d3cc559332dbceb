"""What a user's own teacher, model and data say about the choices of a recipe."""
