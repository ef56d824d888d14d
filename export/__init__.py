"""The vision tower and the embeddings as programs that run without this package: torch.export and ONNX."""
