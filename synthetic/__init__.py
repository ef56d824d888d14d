"""Generated scenes, and what is said about them."""
