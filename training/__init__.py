"""Training: the data the project generates, and the scripts that train the checkpoints."""
