"""A function of tensors as CUDA graphs.

Owns: capture and replay, one graph per set of input shapes. What it saves is the time between kernels: thousands of
launches become one. It does not know what the function computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UP = 3  # runs before a capture, in which libraries choose their kernels and allocate what they keep


class Captured:
    """Runs `function(**inputs)`, tensors in and a tuple of tensors out, as one CUDA graph.

    The function must neither wait for the device nor copy from the host, and depend on its inputs' values only through
    kernels.
    """

    def __init__(self, function: Callable[..., tuple[torch.Tensor, ...]]) -> None:
        self._function = function
        self._graphs: dict[tuple, tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]] = {}

    def __call__(self, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        key = tuple((name, tuple(tensor.shape), tensor.dtype) for name, tensor in sorted(inputs.items()))
        if key not in self._graphs:
            self._graphs[key] = self._capture(inputs)
        graph, static, outputs = self._graphs[key]
        for name, tensor in inputs.items():
            static[name].copy_(tensor, non_blocking=True)
        graph.replay()
        return tuple(output.clone() for output in outputs)  # the next replay overwrites them

    def _capture(
        self, inputs: dict[str, torch.Tensor]
    ) -> tuple[torch.cuda.CUDAGraph, dict[str, torch.Tensor], tuple[torch.Tensor, ...]]:
        static = {name: tensor.clone() for name, tensor in inputs.items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._function(**static)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outputs = self._function(**static)
        return graph, static, outputs
