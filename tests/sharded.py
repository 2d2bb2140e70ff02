"""Run `vla` with FSDP2 on CPUs, which accelerate otherwise supports on GPUs only."""

import sys

from accelerate import state
from accelerate.utils import DistributedType


def main() -> None:
    begin = state.PartialState.__init__

    def as_on_gpus(self, *args, **options):
        begin(self, *args, **options)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    state.PartialState.__init__ = as_on_gpus
    from vla.cli import main

    sys.exit(main(sys.argv[1:]))
