"""Methods of decoder, cache and encoder against plain transcriptions of their formulas.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_decoder_methods.py --benchmark-enable \
        --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds \
        --benchmark-sort=name

Queries and keys are given, as the attachment has them; the plain forms build whole attention
matrices, as code does that asks the model for its attention weights. What a method costs inside a
model is `own_cost.py`'s affair. Without `--benchmark-enable` every case runs once and the two
results are compared.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from foveate import ops
from foveate.core import (
    AttentionView,
    Budget,
    CacheContext,
    DecoderContext,
    EncoderAttentionView,
    Grid,
    Method,
    Plane,
    ProjectorContext,
    Reduction,
    Tokens,
)
from foveate.methods.fastv import FastV
from foveate.methods.fopru import FoPru
from foveate.methods.pyramiddrop import PyramidDrop
from foveate.methods.quickvideo import QuickVideo
from foveate.methods.safewatch import SafeWatch
from foveate.methods.transprune import TransPrune, transition_variation
from foveate.methods.video_xl2 import pool_units

sys.path.insert(0, str(Path(__file__).parent))
from reference import decoder as plain

#: 2880 tokens with text, and a quarter of the heads: whole matrices of all 32 take gigabytes.
FIRST, NUM, TEXT, HEADS, CHANNELS = 20, 2880, 40, 8, 128
LENGTH = FIRST + NUM + TEXT
both = pytest.mark.parametrize("form", ["foveate", "plain"])


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def view_of(q_HSd: torch.Tensor, k_HSd: torch.Tensor) -> AttentionView:
    return AttentionView(q_HSd[None], k_HSd[None], CHANNELS**-0.5, torch.arange(NUM) + FIRST)


def queries_and_keys(heads: int = HEADS, length: int = LENGTH) -> tuple[torch.Tensor, torch.Tensor]:
    q_HSd, k_HSd = draw(2, heads, length, CHANNELS)
    return q_HSd, k_HSd


def in_decoder(method: Method, layer: int, retain: float, view: AttentionView, **more) -> Reduction:
    """The public method before a layer, all tokens there."""
    context = DecoderContext(
        Budget(retain=retain),
        layer=layer,
        num_layers=32,
        num_visual=NUM,
        num_text=FIRST + TEXT,
        visual_N=view.visual_N,
        attention=lambda earlier: view,
        attention_ahead=lambda: view,
        survivors=lambda earlier: torch.arange(LENGTH),
        **more,
    )
    reduction = method.decoder(Tokens(torch.zeros(1, NUM, 1)), context)
    assert reduction is not None
    return reduction


def nearly_all(kept: torch.Tensor, expected: torch.Tensor, share: float = 0.995) -> bool:
    """Sums run in another order, so a token at the border may differ."""
    same = set(kept.tolist()) & set(expected.tolist())
    return len(kept) == len(expected) and len(same) >= share * len(expected)


@pytest.mark.benchmark(group="FastV and PyramidDrop, the last row, 2880 tokens, 8 heads")
@pytest.mark.parametrize("name", ["fastv", "pyramiddrop"])
@both
def test_last_row(benchmark, form: str, name: str) -> None:
    q_HSd, k_HSd = queries_and_keys()
    view = view_of(q_HSd, k_HSd)

    def foveate() -> torch.Tensor:
        method, layer = (FastV(), 2) if name == "fastv" else (PyramidDrop(), 8)
        retain = 0.5 if name == "fastv" else PyramidDrop.card.retain
        return in_decoder(method, layer, retain or 0.5, view).anchor_BM[0]

    def whole() -> torch.Tensor:
        return plain.fastv(q_HSd, k_HSd, FIRST, NUM, NUM // 2)

    kept_K = benchmark(foveate if form == "foveate" else whole)
    if form == "foveate":
        assert nearly_all(kept_K, whole())


@pytest.mark.benchmark(group="TransPrune, one cut, 2880 tokens, 8 heads")
@both
def test_transprune(benchmark, form: str) -> None:
    q_HSd, k_HSd = queries_and_keys()
    read_SD, gave_SD = draw(2, LENGTH, 4096, seed=1)

    def foveate() -> torch.Tensor:
        seen_S = transition_variation(read_SD[None], gave_SD[None])
        view = view_of(q_HSd, k_HSd)
        more = {"observed": lambda layer, module: seen_S / 2}  # attention and MLP
        retain = TransPrune.card.retain or 0.4
        return in_decoder(TransPrune(), 7, retain, view, **more).anchor_BM[0]

    def whole() -> torch.Tensor:
        keep = int(0.875 * NUM)
        return plain.transprune(read_SD, gave_SD, q_HSd, k_HSd, FIRST, NUM, keep)

    kept_K = benchmark(foveate if form == "foveate" else whole)
    if form == "foveate":
        assert nearly_all(kept_K, whole())


@pytest.mark.benchmark(group="AIM, page rank of a layer, 784 tokens, 28 heads")
@both
def test_aim(benchmark, form: str) -> None:
    q_HSd, k_HSd = queries_and_keys(28, 784)
    run = (
        (lambda: ops.page_rank_qk(q_HSd[None], k_HSd[None])[0])
        if form == "foveate"
        else (lambda: plain.aim(q_HSd, k_HSd))
    )
    rank_S = benchmark(run)
    if form == "foveate":
        torch.testing.assert_close(rank_S, plain.aim(q_HSd, k_HSd), atol=1e-5, rtol=1e-3)


@pytest.mark.benchmark(group="SafeWatch, two policies, one layer, 2880 tokens, 8 heads")
@both
def test_safewatch(benchmark, form: str) -> None:
    q_HSd, k_HSd = queries_and_keys()
    behind = FIRST + NUM
    policies = [(behind, behind + 16), (behind + 16, behind + 32)]
    kept = NUM // 10

    def foveate() -> torch.Tensor:
        context = CacheContext(
            Budget(retain=0.1),
            id_N=torch.arange(NUM) + FIRST,
            attention=lambda: view_of(q_HSd, k_HSd),
            visual_N=torch.arange(NUM) + FIRST,
            column_S=torch.arange(LENGTH),
            num_columns=LENGTH,
        )
        keys_1GNd = k_HSd[None, :, FIRST:behind]
        reduction = SafeWatch(policies=tuple(policies)).cache(keys_1GNd, keys_1GNd, context)
        assert reduction is not None
        return reduction.anchor_BM[0]

    def whole() -> torch.Tensor:
        return plain.safewatch(q_HSd, k_HSd, slice(FIRST, behind), policies, kept)

    kept_K = benchmark(foveate if form == "foveate" else whole)
    if form == "foveate":
        assert nearly_all(kept_K, whole())


@pytest.mark.benchmark(group="QuickVideo, one layer, 32 x 196, 4 key heads, retain 0.5")
@both
def test_quickvideo(benchmark, form: str) -> None:
    keys_GNd, time_N = draw(4, 6272, CHANNELS), torch.arange(32).repeat_interleave(196)

    def foveate() -> torch.Tensor:
        context = CacheContext(
            Budget(retain=0.5),
            position_N3=torch.stack([time_N, time_N, time_N], dim=1),
            item_N=torch.zeros(6272, dtype=torch.long),
        )
        reduction = QuickVideo().cache(keys_GNd[None], keys_GNd[None], context)
        assert reduction is not None
        return reduction.anchor_BM[0]

    def groups() -> torch.Tensor:
        return plain.quickvideo(keys_GNd, 16 * 196, 0.5)

    kept_K = benchmark(foveate if form == "foveate" else groups)
    if form == "foveate":
        assert nearly_all(kept_K, groups())


@pytest.mark.benchmark(group="Video-XL-2, pooled keys of one layer, 32 x 196, 4 key heads")
@both
def test_video_xl2(benchmark, form: str) -> None:
    keys_GNd, dense = draw(4, 6272, CHANNELS), {0, 7, 8, 31}
    unit_N = torch.arange(32).repeat_interleave(196)
    dense_U = torch.tensor([unit in dense for unit in range(32)])

    def foveate() -> torch.Tensor:
        reduction = pool_units(unit_N, dense_U, 4)
        return reduction.apply(keys_GNd.transpose(0, 1)[None])[0].transpose(0, 1)

    def units() -> torch.Tensor:
        return plain.video_xl2(keys_GNd, 196, 4, dense)

    out_GMd = benchmark(foveate if form == "foveate" else units)
    if form == "foveate":
        torch.testing.assert_close(out_GMd, units(), atol=1e-5, rtol=1e-5)


@pytest.mark.benchmark(group="ToMe, one block, 32 x 729 x 1152, r = 64")
@both
def test_tome(benchmark, form: str) -> None:
    metric_TNd, x_TND = draw(32, 729, 72), draw(32, 729, 1152, seed=1)

    def foveate() -> torch.Tensor:
        matching = ops.bipartite_matching(metric_TNd, 64, num_protected=0)
        size_TN = torch.ones(32, 729)
        kept_TM = matching.kept_BM
        made = Reduction.merge(matching.assignment_BN, kept_TM.shape[1], size_TN, kept_TM)
        return made.apply(x_TND)

    def images() -> torch.Tensor:
        return plain.tome(metric_TNd, x_TND, 64)

    out_TMD = benchmark(foveate if form == "foveate" else images)
    if form == "foveate":
        torch.testing.assert_close(out_TMD, images(), atol=1e-4, rtol=1e-4)


@pytest.mark.benchmark(group="FoPru with its attention maps, 5 tiles of 576, 16 heads")
@both
def test_fopru(benchmark, form: str) -> None:
    q_THNd, k_THNd = draw(2, 5, 16, 577, 64)
    view = EncoderAttentionView(q_THNd, k_THNd, num_prefix=1)
    grid = Grid((Plane(24, 24),) * 5)

    def foveate() -> torch.Tensor:
        context = ProjectorContext(
            Budget(retain=0.25), grid=grid, encoder_layers=(0,), read_encoder=lambda layer: view
        )
        reduction = FoPru().projector(Tokens.from_grid(torch.zeros(1, 2880, 1), grid), context)
        assert reduction is not None
        return reduction.anchor_BM[0].view(5, 144) % 576

    def tiles() -> torch.Tensor:
        return plain.fopru(q_THNd, k_THNd, 144)

    kept_TK = benchmark(foveate if form == "foveate" else tiles)
    if form == "foveate":
        assert nearly_all(
            (kept_TK + torch.arange(5)[:, None] * 576).flatten(),
            (tiles() + torch.arange(5)[:, None] * 576).flatten(),
        )


@pytest.mark.benchmark(group="Vista-LLaMA, attention of one layer, 1024 tokens, 28 heads on 4")
@both
def test_vista_llama(benchmark, form: str) -> None:
    num = 1024
    q, q_plain = draw(2, 28, num, CHANNELS)
    k, k_plain, v = draw(3, 4, num, CHANNELS, seed=1)
    visual_S = (torch.arange(num) >= FIRST) & (torch.arange(num) < num - TEXT)
    keys_GSd = torch.where(visual_S[:, None], k_plain, k)

    def foveate() -> torch.Tensor:
        given = (q[None], q_plain[None], keys_GSd[None], v[None], visual_S[None])
        return ops.equal_distance_attention(*given)[0][0]

    def whole() -> torch.Tensor:
        repeated = [x.repeat_interleave(7, 0) for x in (k, k_plain, v)]
        return plain.vista_llama((q, repeated[0]), (q_plain, repeated[1]), repeated[2], visual_S)

    out_HSd = benchmark(foveate if form == "foveate" else whole)
    if form == "foveate":
        torch.testing.assert_close(out_HSd, whole(), atol=1e-4, rtol=1e-4)
