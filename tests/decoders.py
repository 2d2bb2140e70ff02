"""The two implementations of greedy decoding that tests compare."""

from vla.decoding.engine import Engine
from vla.decoding.strategies import generate


def greedy(network, batch):
    """Token ids from the engine, decoded one by one."""
    return Engine(network).stepwise(batch).ids


def reference(network, batch, **options):
    """Token ids from `generate` of Transformers."""
    return generate(network, batch, **options).ids
