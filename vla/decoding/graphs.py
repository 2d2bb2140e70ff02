"""CUDA graphs of tensor functions.

Owns: capture and replay, with one graph per set of input shapes. A graph replaces thousands of kernel launches by one.
Only the most recently used graphs are kept, in a shared memory pool, which bounds their GPU memory. It does not know
what the function computes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

_WARM_UP = 3  # runs before a capture, so that libraries select kernels and allocate workspaces
GRAPHS = 16  # number of graphs kept


class _Graph(NamedTuple):
    graph: Any  # torch.cuda.CUDAGraph
    inputs: dict[str, torch.Tensor]
    outputs: tuple[torch.Tensor, ...]


class Captured:
    """Runs `function(**inputs)`, which maps tensors to a tuple of tensors, as one CUDA graph.

    The function must not synchronise with the device, copy from the host, or branch on input values. Graphs must not
    be replayed concurrently, because they share memory.

    Args:
        keep: maximum number of graphs; a new graph replaces the least recently used one.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]], keep: int = GRAPHS) -> None:
        self._function, self._keep = function, keep
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()
        self._pool: Any = None

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        key = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))
        if key not in self._graphs:
            while len(self._graphs) >= self._keep:
                self._graphs.popitem(last=False)
            self._graphs[key] = self._capture(inputs)
        self._graphs.move_to_end(key)
        captured = self._graphs[key]
        for name, tensor in inputs.items():
            captured.inputs[name].copy_(tensor, non_blocking=True)
        captured.graph.replay()
        return tuple(output.clone() for output in captured.outputs)  # the next replay overwrites them

    def _capture(self, inputs: dict[str, torch.Tensor]) -> _Graph:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(**static)
        torch.cuda.current_stream().wait_stream(stream)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            outputs = self._function(**static)
        return _Graph(graph, static, outputs)
