"""Training: step, loop, loss, optimizer, checkpoints, metrics."""
