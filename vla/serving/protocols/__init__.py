"""Wire protocols of `vla serve`, one file each. Importing this package registers them."""

from vla.serving.protocols import openpi, openvla
from vla.serving.protocols.base import PROTOCOLS, WireProtocol

__all__ = ["PROTOCOLS", "WireProtocol", "openpi", "openvla"]
