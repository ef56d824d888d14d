"""Embeddings of data sets on disk and the search over them; nothing here knows a model."""
