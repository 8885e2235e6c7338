"""FlowCut's own cost in a CLIP-L encoder against the time it saves, and its cut in an LLM layer.

    OMP_NUM_THREADS=2 python -m pytest benchmarks/test_flowcut.py --benchmark-enable \
        --benchmark-columns=min,median,rounds --benchmark-sort=name

The shapes are 5 tiles of 576 patches (1 x 2880 tokens) in 24 blocks of 1024 channels, and the cut
of 2880 visual tokens behind one layer of 32 heads of 128 channels (4096). Without
`--benchmark-enable` every case runs once, and counts are checked.
"""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPVisionConfig, CLIPVisionModel

import foveate
from foveate.core import AttentionView, Budget, DecoderContext, EncoderContext, Tokens
from foveate.methods.flowcut import FlowCut

TILES, PATCHES, BLOCKS, HEADS, WIDTH = 5, 576, 24, 16, 64
TARGET = 80  # half of 160 tokens per tile


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def cut_all_blocks(qkv: list[torch.Tensor]) -> int:
    """The method alone, block after block, on given queries, keys and values."""
    tokens, state = Tokens(torch.zeros(TILES, PATCHES + 1, HEADS * WIDTH)), {}
    for layer in range(BLOCKS - 1):
        num = tokens.num_tokens
        context = EncoderContext(
            Budget(tokens=TARGET),
            "flowcut",
            state=state,
            layer=layer,
            num_layers=BLOCKS - 1,
            num_prefix=1,
            has_cls=True,
            queries_BHNd=qkv[0][:, :, :num],
            keys_BHNd=qkv[1][:, :, :num],
            values_BHNd=qkv[2][:, :, :num],
        )
        reduction = FlowCut().encoder(tokens, context)
        if reduction is not None:
            tokens = tokens.reduce(reduction)
    return tokens.num_tokens


def test_own_cost_in_the_encoder(benchmark) -> None:
    qkv = [normal(TILES, HEADS, PATCHES + 1, WIDTH) for _ in range(3)]
    left = benchmark.pedantic(cut_all_blocks, (qkv,), rounds=3, warmup_rounds=1)
    assert left == TARGET + 1


@pytest.mark.parametrize("tokens", [PATCHES, TARGET])
def test_encoder(benchmark, tokens: int) -> None:
    """A tile through the whole encoder with hooks: all patches, and the published target."""
    config = CLIPVisionConfig(
        hidden_size=HEADS * WIDTH,
        intermediate_size=4096,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        image_size=336,
        patch_size=14,
    )
    model = CLIPVisionModel(config).eval()
    pixels = normal(1, 3, 336, 336)
    with torch.no_grad(), foveate.reduce(model, "flowcut", tokens=tokens):
        out = benchmark.pedantic(model, (pixels,), rounds=2)
    assert out.last_hidden_state.shape[1] == tokens + 1


def test_cut_in_the_language_model(benchmark) -> None:
    N, heads, width = 2880, 32, 128
    q, k, v = (normal(1, heads, N + 40, width) for _ in range(3))
    visual_N = torch.arange(8, 8 + N)
    context = DecoderContext(
        Budget(tokens=160),
        layer=2,
        num_layers=32,
        num_visual=N,
        num_text=40,
        visual_N=visual_N,
        attention=lambda layer: AttentionView(q, k, width**-0.5, visual_N, v),
        survivors=lambda layer: torch.arange(N + 40),
        stages=("decoder",),
    )
    tokens = Tokens(torch.zeros(1, N, heads * width))
    reduction = benchmark.pedantic(FlowCut().decoder, (tokens, context), rounds=5, warmup_rounds=1)
    assert reduction is not None and reduction.num_out == 160
