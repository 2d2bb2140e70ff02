"""Wire protocols of `vla serve`, one file each. Importing this package registers them."""

from vla.serving.protocols import openpi, openvla, vla_eval
from vla.serving.protocols.base import PROTOCOLS, WireProtocol

__all__ = ["PROTOCOLS", "WireProtocol", "openpi", "openvla", "vla_eval"]
