"""VFlowOpt's own cost before the language model, against a plain transcription of its formulas.

    OMP_NUM_THREADS=1 python -m pytest benchmarks/test_vflowopt.py --benchmark-enable \
        --benchmark-timer=time.process_time --benchmark-columns=min,median,rounds

The map of the encoder block is part of it; cuts inside the language model sort one number a token.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import interpolate

from foveate.core import (
    Budget,
    EncoderAttentionView,
    Grid,
    Plane,
    ProjectorContext,
    Reduction,
    Tokens,
)
from foveate.methods.vflowopt import VFlowOpt

#: images, heads, patches and head channels of the encoder; grid and channels of the tokens
SHAPES = {
    "1 x 2880 x 4096 (thumbnail and mosaic)": (
        (5, 16, 576, 64),
        Grid((Plane(24, 24), Plane(48, 48))),
        4096,
    ),
    "32 x 196 x 3584": ((32, 16, 729, 72), Grid.video(32, 14, 14), 3584),
}


def to_tokens(grid: Grid, map_IP: torch.Tensor) -> torch.Tensor:
    """Tiles as a mosaic, frames pooled: what a model does to its features."""
    if grid.modality == "image":
        mosaic = map_IP[1:].view(2, 2, 24, 24).transpose(1, 2).reshape(-1)
        return torch.cat([map_IP[0], mosaic])[None]
    frames_T1hw = map_IP.view(-1, 1, 27, 27)
    return interpolate(frames_T1hw, size=(14, 14), mode="bilinear").reshape(1, -1)


def plain(q, k, x_ND: torch.Tensor, grid: Grid, method: VFlowOpt, share: float) -> torch.Tensor:
    """Attention in full, cell by cell."""
    setting, maps = method.setting(share), []
    for q_HPd, k_HPd in zip(q, k, strict=True):
        attention_PP = (
            (q_HPd @ k_HPd.transpose(-1, -2) / q_HPd.shape[-1] ** 0.5).softmax(-1).mean(0)
        )
        received_P = attention_PP.mean(0)
        rows = (received_P > setting.threshold * received_P.mean()).nonzero()[:, 0]
        maps.append(attention_PP[rows].mean(0) if len(rows) else received_P)
    importance_N = to_tokens(grid, torch.stack(maps))[0]
    N = len(importance_N)
    drop = round(N * (1 - setting.keep_input))
    order = importance_N.argsort(stable=True).tolist()
    if grid.modality == "video":
        return x_ND[sorted(order[drop:])]
    positions_N3, cells = grid.positions().tolist(), {}
    for index in order[: drop + int(N / setting.cell**2)]:
        plane, row, column = positions_N3[index]
        key = (plane, int(row / setting.cell), int(column / setting.cell))
        cells.setdefault(key, []).append(index)
    out = {index: x_ND[index] for index in order[drop + int(N / setting.cell**2) :]}
    for members in cells.values():
        weight = importance_N[members] / importance_N[members].sum()
        out[max(members, key=importance_N.__getitem__)] = weight @ x_ND[members]
    return torch.stack([out[index] for index in sorted(out)])


@pytest.mark.benchmark(group="VFlowOpt, encoder map and projector stage, retain 0.1")
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("form", ["foveate", "plain"])
def test_vflowopt(benchmark, form: str, shape: str) -> None:
    (images, heads, patches, channels), grid, width = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, images, heads, patches, channels, generator=generator).unbind()
    x_ND = torch.randn(grid.num_tokens, width, generator=generator)
    method, share = VFlowOpt(threshold=1.03), 0.1
    view = EncoderAttentionView(q, k, token_map=lambda map_IP: to_tokens(grid, map_IP))
    tokens = Tokens.from_grid(x_ND, grid)

    def foveate() -> torch.Tensor:
        context = ProjectorContext(
            Budget(retain=share), grid=grid, encoder_layers=(0,), read_encoder=lambda layer: view
        )
        reduction: Reduction | None = method.projector(tokens, context)
        assert reduction is not None
        return reduction.apply(tokens.x_BND)[0]

    def transcribed() -> torch.Tensor:
        return plain(q, k, x_ND, grid, method, share)

    out_MD = benchmark(foveate if form == "foveate" else transcribed)
    if form == "foveate":
        torch.testing.assert_close(out_MD, transcribed(), atol=1e-4, rtol=1e-4)
