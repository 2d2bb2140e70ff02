"""CUDA graphs of tensor functions.

Owns: capture and replay, with one graph per set of input shapes. A graph replaces thousands of kernel launches by one
launch. It does not know what the function computes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UP = 3  # runs before a capture, in which libraries select kernels and allocate workspaces


class Captured:
    """Runs `function(**inputs)`, which maps tensors to a tuple of tensors, as one CUDA graph.

    The function must not synchronise with the device, copy from the host, or depend on input values outside of kernels.
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
