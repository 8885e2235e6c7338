"""What a cache in few bits costs: storing a prompt, restoring it, and one step of decoding.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_quantised_cache.py --benchmark-enable \
        --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds \
        --benchmark-sort=name

One layer of a model with 4 key heads of 128 channels, 8192 tokens in float32. Beside it stands
the plain layer, whose step copies the cache as well, because its tensors grow.
Without `--benchmark-enable` every case runs once and the results are compared.
"""

from __future__ import annotations

import pytest
import torch

from foveate.attach.cache import ReducedLayer
from foveate.attach.quantised import QuantisedLayer
from foveate.core import CacheStorage
from foveate.ops import quantise

HEADS, TOKENS, CHANNELS = 4, 8192, 128


def states(length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, 1, HEADS, length, CHANNELS, generator=generator)
    return keys, values


@pytest.mark.benchmark(group="one layer, 4 x 8192 x 128")
@pytest.mark.parametrize("dim", [-2, -1], ids=["keys", "values"])
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("what", ["store", "restore"])
def test_groups(benchmark, what: str, bits: int, dim: int) -> None:
    x, _ = states(TOKENS)
    stored = quantise(x, bits=bits, group=64, dim=dim)
    if what == "store":
        stored = benchmark(quantise, x, bits=bits, group=64, dim=dim)
        back = stored.dequantise()
    else:
        back = benchmark(stored.dequantise)
    assert (back - x).abs().amax() <= 0.51 * stored.step.amax()


@pytest.mark.benchmark(group="one layer, one step behind 8192 tokens")
@pytest.mark.parametrize("form", ["stored", "plain"])
def test_step(benchmark, form: str) -> None:
    make = {"stored": lambda: QuantisedLayer(CacheStorage()), "plain": ReducedLayer}[form]
    new = states(1, seed=1)

    def prepared() -> tuple[tuple[ReducedLayer], dict]:
        layer = make()
        layer.update(*states(TOKENS))
        layer.settle()
        return (layer,), {}

    def step(layer: ReducedLayer) -> torch.Tensor:
        keys, _ = layer.update(*new)
        layer.settle()
        return keys

    keys = benchmark.pedantic(step, setup=prepared, rounds=5)
    assert keys.shape == (1, HEADS, TOKENS + 1, CHANNELS)
    assert torch.equal(keys[:, :, -1:], new[0])
