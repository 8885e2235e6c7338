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

from foveate.core import (
    AttentionView,
    Budget,
    DecoderContext,
    EncoderAttentionView,
    Grid,
    Method,
    Plane,
    ProjectorContext,
    Reduction,
    Tokens,
)
from foveate.methods.catp import aligned_coverage
from foveate.methods.divprune import DivPrune
from foveate.methods.dycoke import DyCoke
from foveate.methods.evs import EVS
from foveate.methods.hiprune import HiPrune
from foveate.methods.holitom import HoliTom
from foveate.methods.lvlm_csp import LVLMCSP
from foveate.methods.m3 import M3
from foveate.methods.todre import diverse_order
from foveate.methods.ts_llava import TSLLaVA
from foveate.methods.vidcom2 import VidCom2
from foveate.methods.visionzip import VisionZip

sys.path.insert(0, str(Path(__file__).parent))
from reference import catp as plain_catp
from reference import divprune as plain_divprune
from reference import dycoke as plain_dycoke
from reference import evs as plain_evs
from reference import hiprune as plain_hiprune
from reference import holitom as plain_holitom
from reference import lvlm_csp as plain_lvlm_csp
from reference import m3 as plain_m3
from reference import todre as plain_todre
from reference import ts_llava as plain_ts_llava
from reference import vidcom2 as plain_vidcom2
from reference import visionzip as plain_visionzip

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


@pytest.mark.benchmark(group="ToDRE, stage 1, 2880 x 4096, retain 0.1")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_todre(benchmark, form: str) -> None:
    x_NC = torch.randn(2880, 4096, generator=torch.Generator().manual_seed(0))
    order = benchmark(diverse_order if form == "foveate" else plain_todre.select, x_NC, 288, 7)
    if form == "foveate":
        assert order.tolist() == plain_todre.select(x_NC, 288, 7).tolist()


@pytest.mark.benchmark(group="CATP, stage 1, 576 x 4096, retain 0.222")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_catp(benchmark, form: str) -> None:
    x_PD = torch.randn(576, 4096, generator=torch.Generator().manual_seed(0))
    run = aligned_coverage if form == "foveate" else plain_catp.select
    order_K = benchmark(run, x_PD, x_PD[:20].mean(0), 351, 0.7)
    if form == "foveate":
        expected_K = plain_catp.select(x_PD, x_PD[:20].mean(0), 351, 0.7)
        # Sums run in another order, so equal gains may swap their tokens.
        same = set(order_K.tolist()) & set(expected_K.tolist())
        assert len(same) >= 0.99 * len(expected_K)


def at_projector(
    method: Method, x_TLD: torch.Tensor, budget: Budget, score_TL: torch.Tensor | None = None
) -> Reduction:
    """The public method on a video of square frames."""
    T, L, _ = x_TLD.shape
    grid = Grid.video(T, round(L**0.5), round(L**0.5))
    signals = {} if score_TL is None else {"encoder.cls_attention": score_TL.reshape(1, -1)}
    context = ProjectorContext(budget, grid=grid, read=signals.get)
    reduction = method.projector(Tokens.from_grid(x_TLD.flatten(0, 1), grid), context)
    assert reduction is not None
    return reduction


@pytest.mark.benchmark(group="EVS, 32 x 196 x 3584, retain 0.25")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_evs(benchmark, form: str) -> None:
    x_TLD, _ = video()
    expected = plain_evs.select(x_TLD, 1568)
    if form == "plain":
        benchmark(plain_evs.select, x_TLD, 1568)
        return
    reduction = benchmark(at_projector, EVS(), x_TLD, Budget(retain=0.25))
    assert reduction.anchor_BM[0].tolist() == expected.tolist()


@pytest.mark.benchmark(group="VidCom2, 32 x 196 x 3584, retain 0.25")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_vidcom2(benchmark, form: str) -> None:
    x_TLC, _ = video()
    expected = plain_vidcom2.select(x_TLC, 0.25)
    if form == "plain":
        benchmark(plain_vidcom2.select, x_TLC, 0.25)
        return
    method = VidCom2(rounding="frame")
    reduction = benchmark(at_projector, method, x_TLC, Budget(retain=0.25))
    # Sums run in another order, so a patch at the border may differ.
    same = set(reduction.anchor_BM[0].tolist()) & set(expected.tolist())
    assert len(same) >= 0.999 * len(expected)


@pytest.mark.benchmark(group="M3, 32 x 196 x 3584, 49 tokens per frame")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_m3(benchmark, form: str) -> None:
    x_TLD, _ = video()

    def foveate() -> torch.Tensor:
        return at_projector(M3(), x_TLD, Budget(retain=0.25)).apply(x_TLD.flatten(0, 1)[None])[0]

    def plain() -> torch.Tensor:
        return plain_m3.pool(x_TLD, SIDE, 2)

    out_MD = benchmark(foveate if form == "foveate" else plain)
    if form == "foveate":
        torch.testing.assert_close(out_MD, plain(), atol=1e-5, rtol=1e-5)


@pytest.mark.benchmark(group="VisionZip on features")
@pytest.mark.parametrize("shape", [(32, 196, 3584), (5, 576, 4096)], ids=str)
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_visionzip(benchmark, form: str, shape: tuple[int, int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    x_TLD = torch.randn(shape, generator=generator)
    score_TL = torch.rand(shape[:2], generator=generator)
    method, kept = VisionZip(similarity="features"), round(shape[1] / 9)

    def foveate() -> torch.Tensor:
        reduction = at_projector(method, x_TLD, Budget(tokens=kept * shape[0]), score_TL)
        return reduction.apply(x_TLD.flatten(0, 1)[None])[0]

    def plain() -> torch.Tensor:
        return plain_visionzip.reduce(x_TLD, score_TL, *method.split(kept))

    out_MD = benchmark(foveate if form == "foveate" else plain)
    if form == "foveate":
        torch.testing.assert_close(out_MD, plain(), atol=1e-4, rtol=1e-4)


@pytest.mark.benchmark(group="HiPrune with its attention maps, 5 tiles of 576, 16 heads")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_hiprune(benchmark, form: str) -> None:
    q, k = torch.randn(2, 2, 5, 16, 577, 64, generator=torch.Generator().manual_seed(0))
    views = [EncoderAttentionView(*qk, num_prefix=1) for qk in zip(q, k, strict=True)]
    grid = Grid((Plane(24, 24),) * 5)
    tokens = Tokens.from_grid(torch.zeros(1, 2880, 1), grid)

    def foveate() -> torch.Tensor:
        context = ProjectorContext(
            Budget(tokens=640), grid=grid, encoder_layers=(0, 1), read_encoder=views.__getitem__
        )
        reduction = HiPrune().projector(tokens, context)
        assert reduction is not None
        return reduction.anchor_BM[0].view(5, 128) % 576

    def plain() -> torch.Tensor:
        return plain_hiprune.select(q, k, 24, 128)

    kept_TK = benchmark(foveate if form == "foveate" else plain)
    if form == "foveate":
        assert torch.equal(kept_TK, plain())


@pytest.mark.benchmark(group="DyCoke, 32 x 196 x 3584, K 0.7")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_dycoke(benchmark, form: str) -> None:
    x_TND, _ = video()
    expected = plain_dycoke.select(x_TND, 0.3)
    if form == "plain":
        benchmark(plain_dycoke.select, x_TND, 0.3)
        return
    reduction = benchmark(at_projector, DyCoke(keep=0.3), x_TND, Budget(retain=0.475))
    # Sums run in another order, so a patch at the border may differ.
    same = set(reduction.anchor_BM[0].tolist()) & set(expected.tolist())
    assert len(same) >= 0.999 * len(expected)


@pytest.mark.benchmark(group="TS-LLaVA, 32 x 196 x 3584, retain 0.1")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_ts_llava(benchmark, form: str) -> None:
    x_TND, _ = video()
    x_PD, sampled = x_TND.flatten(0, 1), 627

    def foveate() -> torch.Tensor:
        return at_projector(TSLLaVA(), x_TND, Budget(tokens=sampled)).apply(x_PD[None])[0]

    def plain() -> torch.Tensor:
        return plain_ts_llava.sample(x_PD, sampled)

    out_SD = benchmark(foveate if form == "foveate" else plain)
    if form == "foveate":
        assert torch.equal(out_SD, plain())


@pytest.mark.benchmark(group="LVLM_CSP, both decoder stages, 2880 x 4096, 32 heads")
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_lvlm_csp(benchmark, form: str) -> None:
    num, text, generator = 2880, 60, torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 32, num + text, 128, generator=generator) for _ in range(2))
    view = AttentionView(q, k, 128**-0.5, torch.arange(num) + 20)
    tokens, method = Tokens(torch.zeros(1, num, 4096)), LVLMCSP()

    def context(layer: int) -> DecoderContext:
        return DecoderContext(
            Budget(retain=11 / 32),
            layer=layer,
            num_layers=32,
            visual_N=view.visual_N,
            attention=lambda earlier: view,
            survivors=lambda earlier: torch.arange(num + text),
        )

    def foveate() -> torch.Tensor:
        method.decoder(tokens, context(0))
        reduction = method.decoder(tokens, context(16))
        assert reduction is not None
        return reduction.anchor_BM[0]

    def plain() -> torch.Tensor:
        return plain_lvlm_csp.prune(q, k, 20, num, num // 4)

    kept_K = benchmark(foveate if form == "foveate" else plain)
    if form == "foveate":
        assert len(set(kept_K.tolist()) & set(plain().tolist())) >= 0.999 * (num // 4)
