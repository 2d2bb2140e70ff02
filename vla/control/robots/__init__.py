"""Robots for the controller."""
