"""Small utilities that are independent of robots and models."""
