"""The training job: configuration, checks, the loop on the DeepSpeed engine, evaluation, checkpoints."""
