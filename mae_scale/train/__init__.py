"""Training: DeepSpeed engine, loop, schedule, checkpoints, stopping, metrics."""
