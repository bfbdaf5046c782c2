"""What is refused before a model is made of it, and in which words."""
