"""The real-time controller: clock, robot, buffer of actions, the filter between policy and robot, and their loop."""
