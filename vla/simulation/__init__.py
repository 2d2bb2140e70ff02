"""Gymnasium environments, adapted to the package's conventions, and the processes that run them."""
