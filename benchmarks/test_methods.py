"""Methods against plain transcriptions of their formulas; the ratio is the figure in brackets.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_methods.py --benchmark-enable \
        --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds \
        --benchmark-sort=name

CPU time of one thread varies least on a busy machine; leave the timer away for wall time.
Without `--benchmark-enable` every case runs once and the two results are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from foveate.core import Budget, Grid, ProjectorContext, Tokens
from foveate.methods.divprune import DivPrune
from foveate.methods.holitom import HoliTom

sys.path.insert(0, str(Path(__file__).parent))
from reference import divprune as plain_divprune
from reference import holitom as plain_holitom

FRAMES, SIDE, CHANNELS = 32, 14, 3584


def video(frames: int = FRAMES, places: int = SIDE * SIDE, channels: int = CHANNELS):
    """Four scenes in which about two thirds of the places stand still, and attention scores."""
    generator = torch.Generator().manual_seed(0)
    still_TN1 = torch.rand(1, places, 1, generator=generator).expand(frames, -1, -1) < 0.67
    scene_TNC = torch.randn(4, places, channels, generator=generator)
    scene_TNC = scene_TNC.repeat_interleave(frames // 4, 0)
    moving_TNC = torch.randn(frames, places, channels, generator=generator)
    feat_TNC = torch.where(still_TN1, scene_TNC + 0.3 * moving_TNC, moving_TNC)
    return feat_TNC, torch.rand(frames, places, generator=generator)


def holitom(feat_TNC: torch.Tensor, attn_TN: torch.Tensor, retain: float) -> torch.Tensor:
    """The public method, from features to the tokens that remain."""
    frames, places, channels = feat_TNC.shape
    grid = Grid.video(frames, 1, places)
    tokens = Tokens.from_grid(feat_TNC.view(1, -1, channels), grid)
    signals = {"encoder.received_attention": attn_TN.view(1, -1)}
    context = ProjectorContext(Budget(retain=retain), grid=grid, read=signals.get)
    reduction = HoliTom(tau=0.8).projector(tokens, context)
    assert reduction is not None
    return reduction.apply(tokens.x_BND)[0]


@pytest.mark.benchmark(group="HoliTom, outer stage, 32 x 196 x 3584, retain 0.15")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_holitom_outer(benchmark, form: str) -> None:
    feat_TNC, attn_TN = video()
    run = holitom if form == "foveate" else plain_holitom.outer
    out_MC = benchmark(run, feat_TNC, attn_TN, 0.15)
    if form == "foveate":
        expected_MC = plain_holitom.outer(feat_TNC, attn_TN, 0.15)
        torch.testing.assert_close(out_MC, expected_MC, atol=1e-4, rtol=1e-4)


@pytest.mark.benchmark(group="DivPrune, 2880 x 4096, retain 0.1")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_divprune(benchmark, form: str) -> None:
    x_NC = torch.randn(2880, 4096, generator=torch.Generator().manual_seed(0))
    grid = Grid.image(1, 2880)

    def foveate() -> torch.Tensor:
        context = ProjectorContext(Budget(retain=0.1), grid=grid)
        DivPrune().projector(Tokens.from_grid(x_NC, grid), context)
        return context.state["order"]

    order = benchmark(foveate if form == "foveate" else lambda: plain_divprune.select(x_NC, 288))
    if form == "foveate":
        assert order.tolist() == plain_divprune.select(x_NC, 288).tolist()
