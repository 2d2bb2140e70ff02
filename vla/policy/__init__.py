"""A policy: observations and instructions to action chunks, its session in an episode, and its checkpoints."""

from vla.policy.policy import ChunkPolicy, Policy, Prediction

__all__ = ["ChunkPolicy", "Policy", "Prediction"]
