"""Reading and writing demonstrations in the LeRobotDataset v3 format."""
