"""Evaluation: results of rollouts, their comparison, and reports."""
