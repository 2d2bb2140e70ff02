"""Training: batches, the training loop, and DAgger rollouts."""
