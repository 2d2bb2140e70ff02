"""Small tools that know nothing of robots or models."""
