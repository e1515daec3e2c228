"""Small complete examples of what a user brings."""
