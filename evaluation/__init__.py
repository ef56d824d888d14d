"""Evaluation: what a checkpoint gets right, measured on data it never saw."""
