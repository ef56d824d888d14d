"""Models behind servers that others made: embeddings over HTTP, and a page."""
