"""Training: batches, the training loop, and the rollouts that DAgger labels."""
