"""The engine on a CUDA GPU: `CUDA_VISIBLE_DEVICES=0 scripts/test tests/decoding/test_cuda.py`. For its speed, see
`scripts/gpu_suite`."""

import copy

import pytest
import torch

from tests.decoders import reference
from vla.decoding.engine import Engine
from vla.decoding.graphs import GRAPHS

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]

WORDS = ["reach", "pick up the red cube", "please put the green ball on the blue zone"]


@pytest.fixture
def on_gpu(nano):
    network, processor = copy.deepcopy(nano)
    return network.to("cuda"), processor


@pytest.mark.parametrize("rows", [1, 3])
def test_tokens_equal_generate(on_gpu, observations, rows):
    network, processor = on_gpu
    engine = Engine(network)
    for words in WORDS:
        batch = processor.observe(observations(rows), [words] * rows)
        expected = reference(network, batch).cpu()
        for _ in range(2):  # the first call captures the graph, the second replays it
            assert torch.equal(engine.stepwise(batch).ids.cpu(), expected)
        draft = torch.full_like(expected, network.config.action_token_begin)
        assert torch.equal(engine.parallel(batch, draft).ids.cpu(), expected)


def test_the_number_of_graphs_is_limited_and_they_share_memory(on_gpu, observations):
    network, processor = on_gpu
    engine, memory = Engine(network), []
    for count in range(1, GRAPHS + 5):
        batch = processor.observe(observations(1), [" ".join(["red"] * count)])
        assert torch.equal(engine.stepwise(batch).ids.cpu(), reference(network, batch).cpu())
        memory.append(torch.cuda.memory_reserved())
    (captured,) = engine._graphs.values()
    assert len(captured) == GRAPHS and memory[-1] < 1.5 * memory[0]
