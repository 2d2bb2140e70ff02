"""The two greedy decoders that tests compare."""

from vla.decoding.engine import Engine
from vla.decoding.strategies import generate


def greedy(network, batch):
    """Ids by the engine, token by token."""
    return Engine(network).stepwise(batch).ids


def reference(network, batch, **options):
    """Ids by stock `generate`."""
    return generate(network, batch, **options).ids
