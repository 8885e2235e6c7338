"""Own cost of the methods that read how well text fits pictures, scores given.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_text_guided.py --benchmark-enable \
        --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds

"batched" is the public method from features to the tokens that remain; "plain" goes plane by plane
(Recoverable) or frame by frame (Free Video-LLM). Without `--benchmark-enable` every case runs once
and the two results are compared.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import adaptive_avg_pool2d

from foveate.core import Budget, EncoderAttentionView, Grid, Plane, ProjectorContext, Tokens
from foveate.methods.free_video_llm import FreeVideoLLM, partners, pooled_shape, region_boxes
from foveate.methods.recoverable import Recoverable

VIDEO = (Grid.video(32, 14, 14), 3584)
IMAGE = (Grid((Plane(24, 24),) * 5), 4096)
BUDGET = Budget(retain=0.1)


def case(grid: Grid, channels: int, space: int = 768, heads: int = 16):
    """Tokens, a block of attention with [CLS] for every plane, and the signals of the text."""
    generator = torch.Generator().manual_seed(0)
    T, L = len(grid.planes), grid.planes[0].num_patches
    tokens = Tokens.from_grid(torch.randn(grid.num_tokens, channels, generator=generator), grid)
    q, k = torch.randn(2, T, heads, L + 1, 64, generator=generator)
    view = EncoderAttentionView(q, k, num_prefix=1, has_cls=True)
    signals = {
        "text.patch_similarity": 0.1 * torch.randn(1, T * L, generator=generator) ** 3,
        "text.frame_similarity": torch.randn(1, T, generator=generator),
        "paired.text": torch.randn(1, space, generator=generator),
        "paired.patches": torch.randn(1, T * L, space, generator=generator),
    }
    return tokens, view, signals


def context_of(grid: Grid, view: EncoderAttentionView, signals: dict) -> ProjectorContext:
    return ProjectorContext(
        BUDGET, grid=grid, read=signals.get, encoder_layers=(0,), read_encoder={0: view}.get
    )


def run(method, grid: Grid, tokens: Tokens, view, signals) -> torch.Tensor:
    reduction = method.projector(tokens, context_of(grid, view, signals))
    return tokens.reduce(reduction).x_BND[0]


def plane_by_plane(grid: Grid, tokens: Tokens, view, signals) -> torch.Tensor:
    """Recoverable, every plane as an item of its own."""
    made, first = [], 0
    for t, plane in enumerate(grid.planes):
        part = slice(first, first + plane.num_patches)
        alone = Grid((plane,))
        scores = {"text.patch_similarity": signals["text.patch_similarity"][:, part]}
        x_1ND = tokens.x_BND[:, part]
        mine = Tokens.from_grid(x_1ND, alone)
        made.append(run(Recoverable(), alone, mine, view.images(t, t + 1), scores))
        first = part.stop
    return torch.cat(made)


def frame_by_frame(grid: Grid, tokens: Tokens, signals: dict) -> torch.Tensor:
    """Free Video-LLM, written out."""
    T, H, W = grid.shape
    paths = FreeVideoLLM().paths(grid, BUDGET)
    assert paths is not None
    x_TLD = tokens.x_BND[0].view(T, H * W, -1)
    shown_TLE = signals["paired.patches"][0].view(T, H * W, -1)
    pooled, pair_P2 = pooled_shape(H, W), partners(H, W)
    rows, columns = box = paths.box(pooled)
    score_T = signals["text.frame_similarity"][0]
    slow = score_T.topk(paths.slow).indices.sort().values.tolist()
    middle = [int(i * T / paths.middle) for i in range(paths.middle)]
    made = []
    for t in slow + middle:
        similarity_P = torch.cosine_similarity(
            signals["paired.text"], shown_TLE[t][pair_P2].amax(1), dim=1
        )
        left, top = region_boxes(similarity_P[None], pooled, box, paths.roi)[0].tolist()
        sharp_yxD = x_TLD[t][pair_P2].amax(1).view(*pooled, -1)
        made.append(sharp_yxD[top : top + rows, left : left + columns].flatten(0, 1))
    fast = score_T.topk(paths.fast).indices.sort().values.tolist()
    for t in fast:
        frame_1DHW = x_TLD[t].view(1, H, W, -1).permute(0, 3, 1, 2)
        made.append(adaptive_avg_pool2d(frame_1DHW, (paths.rows, paths.columns))[0].flatten(1).mT)
    return torch.cat(made)


@pytest.mark.parametrize("way", ["batched", "plain"])
@pytest.mark.parametrize("shape", ["video", "image"])
def test_recoverable(benchmark, shape: str, way: str) -> None:
    grid, channels = VIDEO if shape == "video" else IMAGE
    given = case(grid, channels)
    if way == "batched":
        made = benchmark(run, Recoverable(), grid, *given)
    else:
        made = benchmark(plane_by_plane, grid, *given)
    assert len(made) == Recoverable().count(grid, BUDGET).tokens
    if not benchmark.enabled:
        torch.testing.assert_close(made, run(Recoverable(), grid, *given), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("way", ["batched", "plain"])
def test_free_video_llm(benchmark, way: str) -> None:
    grid, channels = VIDEO
    tokens, view, signals = case(grid, channels)
    if way == "batched":
        made = benchmark(run, FreeVideoLLM(), grid, tokens, view, signals)
    else:
        made = benchmark(frame_by_frame, grid, tokens, signals)
    if not benchmark.enabled:
        expected = run(FreeVideoLLM(), grid, tokens, view, signals)
        torch.testing.assert_close(made, expected, atol=1e-5, rtol=1e-4)
