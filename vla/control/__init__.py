"""The real-time controller: control loop, clock, action buffer, inference, safety filter and robots."""
