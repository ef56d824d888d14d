"""Checks of a folder before it is published or trusted: `python -m internvl.publishing code DIR`."""
