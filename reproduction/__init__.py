"""The bundled models: their run, ablation and report."""
