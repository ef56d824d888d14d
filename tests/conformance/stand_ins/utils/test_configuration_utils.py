"""Stands in for a file that the source distribution leaves out: no values to try on every configuration."""

config_common_kwargs: dict = {}
