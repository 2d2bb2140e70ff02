"""Gymnasium environments as this package sees them, and the processes in which they run."""
