"""Utilities that are independent of robots and models."""
