"""Stands in for a file that the source distribution leaves out; `generation_checks.py` has generation checks of our
own."""


class GenerationTesterMixin:
    """No tests."""
