"""The task of lm-eval and lmms-eval, for their `--include_path`."""
