"""Action-token robot policies: train on demonstrations, roll out in simulation, deploy in real time."""

__version__ = "0.1.0"
