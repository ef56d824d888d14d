"""Stands in for a file that the source distribution leaves out: the export suite does not run."""


class ExportTesterMixin:
    """No tests."""
