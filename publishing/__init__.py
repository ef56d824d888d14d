"""Checks of a folder before it is published or trusted, and its way to the Hub: `python -m internvl.publishing`."""
