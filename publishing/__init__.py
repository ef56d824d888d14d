"""What a folder is, before it is published or trusted: `python -m internvl.publishing code DIR`."""
