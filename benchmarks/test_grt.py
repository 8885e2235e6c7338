"""GRT's own cost on the pictures of a clip, and the encoder time that its gate saves.

    OMP_NUM_THREADS=2 python -m pytest benchmarks/test_grt.py --benchmark-enable \
        --benchmark-columns=min,median,rounds --benchmark-sort=name

The gate and the packing see 32 frames of 384 x 384 pixels in 27 x 27 patches of 14 (196 tokens a
frame behind pooling, 3584 channels). The encoder has the width of ViT-S (12 blocks of 384 channels)
and reads 8 frames of 224 x 224 in patches of 16: without a method, when a square of 32 pixels
wanders over a still picture, and when nothing moves. Without `--benchmark-enable` every case runs
once, and counts are checked.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

import foveate
from foveate.core import Budget, Grid, PatchesContext, ProjectorContext, Tokens
from foveate.methods.grt import GRT

FRAMES = 32


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("metric", ["l2", "ssim"])
def test_gate(benchmark, metric: str) -> None:
    pixels = normal(1, 3, 384, 384).repeat(FRAMES, 1, 1, 1)
    context = PatchesContext(Budget(0.5), "grt", pixels_B3HW=pixels, patch_size=(14, 14))
    method = GRT(metric=metric, tau=0.001)
    keep_BP = benchmark.pedantic(method.patches, (context,), rounds=5, warmup_rounds=1)
    assert keep_BP.sum(1).tolist() == [27 * 27] + [0] * (FRAMES - 1)


def test_packing(benchmark) -> None:
    grid = Grid.video(FRAMES, 14, 14)
    tokens = Tokens.from_grid(normal(grid.num_tokens, 3584), grid)
    key_T = (torch.arange(FRAMES) % 8 == 0).float()
    carried = {
        "motion": normal(grid.num_tokens).abs(),
        "key": key_T.repeat_interleave(14 * 14),
    }
    context = ProjectorContext(Budget(0.5), "grt", grid=grid, read_carried=carried.get)
    reduction = benchmark.pedantic(GRT().projector, (tokens, context), rounds=5, warmup_rounds=1)
    assert reduction is not None and reduction.num_out == FRAMES * 98


@pytest.mark.parametrize("clip", ["untouched", "square", "static"])
def test_encoder(benchmark, clip: str) -> None:
    config = SiglipVisionConfig(
        hidden_size=384,
        intermediate_size=1536,
        num_hidden_layers=12,
        num_attention_heads=6,
        image_size=224,
        patch_size=16,
    )
    model = SiglipVisionModel(config).eval()
    pixels = normal(1, 3, 224, 224).repeat(8, 1, 1, 1)
    if clip == "square":
        for t in range(8):
            pixels[t, :, 64:96, 24 * t : 24 * t + 32] = 4.0
    attached = contextlib.nullcontext()
    if clip != "untouched":
        attached = foveate.reduce(model, "grt", retain=0.5, restore=True)
    with torch.no_grad(), attached as run:
        out = benchmark.pedantic(model, (pixels,), rounds=5, warmup_rounds=1)
        assert out.last_hidden_state.shape == (8, 196, 384)
        if run is not None:
            (stage,) = run.report.stages
            entered = sum(stage.after)
            assert entered == 196 if clip == "static" else 196 < entered < 2 * 196
