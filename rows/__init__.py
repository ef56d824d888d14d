"""Rows of data and the files that they name: JSON, tables, shards, pairs, images and videos."""
