"""What is trained, and where it starts."""
