"""What a model needs and what a run costs."""
