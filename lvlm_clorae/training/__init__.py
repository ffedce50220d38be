"""Training: configuration, checks, the loop on the DeepSpeed engine, evaluation, checkpoints, export."""
