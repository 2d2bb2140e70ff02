"""Robots that the controller drives."""
