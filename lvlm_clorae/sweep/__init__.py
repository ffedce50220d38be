"""Hyperparameter sweeps: many runs from one YAML file (docs/sweeps.md). Imports neither torch nor transformers."""
