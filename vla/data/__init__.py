"""Demonstrations on disk: LeRobotDataset v3, written and read."""
