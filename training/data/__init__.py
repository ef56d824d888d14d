"""What is trained on: pairs, dialogues, their checks and collators."""
