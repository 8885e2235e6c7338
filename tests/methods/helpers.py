"""Items, contexts and attention views for methods, without any model."""

from __future__ import annotations

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
    TokenKind,
    Tokens,
)

LAYOUTS = {
    "image": Grid.image(6, 8),
    "image, newline at end": Grid.image(6, 8, newlines_at_end=1),
    "any resolution": Grid((Plane(5, 5), Plane(8, 10, row_newline=True)), newlines_at_end=1),
    "video": Grid.video(6, 5, 7),
    "video, newline at end": Grid.video(6, 5, 5, newlines_at_end=1),
    "video, newline per row": Grid((Plane(4, 5, row_newline=True),) * 6, "video"),
    "video, [CLS] per frame": Grid((Plane(4, 5, prefix=1),) * 6, "video", newlines_at_end=1),
    "one frame": Grid.video(1, 6, 6),
}


def item(grid: Grid, seed: int = 0, channels: int = 16) -> Tokens:
    """Tokens of a video (or image) in which frames resemble one another here and there."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(grid.num_tokens, channels, generator=generator)
    shared = torch.randn(64, channels, generator=generator)
    place_N = grid.positions()[:, 1:].sum(1)
    mixed = torch.rand(grid.num_tokens, 1, generator=generator) < 0.5
    x_ND = torch.where(mixed, shared[place_N % 64] + 0.05 * draw, draw)
    return Tokens.from_grid(x_ND, grid)


def encoder_view(grid: Grid, seed: int = 0) -> EncoderAttentionView:
    """A block in which all patches of an item are one image, with random queries and keys."""
    generator = torch.Generator().manual_seed(seed + 2)
    q, k, v = torch.randn(3, 1, 2, grid.num_patches, 6, generator=generator)

    def to_tokens(map_IN: torch.Tensor) -> torch.Tensor:
        map_1N = map_IN.new_full((1, grid.num_tokens), torch.nan)
        map_1N[:, grid.patch_index()] = map_IN
        return map_1N

    return EncoderAttentionView(q, k, v, token_map=to_tokens)


def context_for(
    grid: Grid, budget: Budget, scores_N: torch.Tensor | None = None, seed: int = 0
) -> ProjectorContext:
    """A context whose encoder signals are `scores_N` (random ones by default)."""
    if scores_N is None:
        scores_N = torch.rand(grid.num_tokens, generator=torch.Generator().manual_seed(seed + 1))
    scores_N = scores_N.clone()
    scores_N[grid.kinds() != TokenKind.PATCH] = torch.nan
    generator = torch.Generator().manual_seed(seed + 4)
    patch_BNE = torch.randn(1, grid.num_tokens, 8, generator=generator)
    patch_BNE[:, grid.kinds() != TokenKind.PATCH] = torch.nan
    signals = {
        "text.patch_similarity": 2 * scores_N[None] - 1,
        "text.frame_similarity": torch.rand(1, len(grid.planes), generator=generator),
        "paired.text": torch.randn(1, 8, generator=generator),
        "paired.frames": torch.randn(1, len(grid.planes), 8, generator=generator),
        "paired.patches": patch_BNE,
        "encoder.cls_attention": scores_N[None],
        "encoder.received_attention": scores_N[None],
        "text.segment": torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(seed + 3)),
    }
    view = encoder_view(grid, seed)
    return ProjectorContext(
        budget,
        seed=seed,
        grid=grid,
        read=signals.get,
        encoder_layers=(0,),
        read_encoder=lambda layer: view,
        # What GRT's gate hands on; no other method's encoder stage has run.
        read_carried={"motion": scores_N, "key": (scores_N > 0.9).float()}.get,
    )


def reduce_item(
    method: Method, grid: Grid, budget: Budget, tokens: Tokens | None = None, **context
) -> Reduction:
    """What the projector stage of a method does to an item; it must do something."""
    tokens = item(grid) if tokens is None else tokens
    reduction = method.projector(tokens, context_for(grid, budget, **context))
    assert reduction is not None
    return reduction


def view_of(row_S: torch.Tensor, visual_N: torch.Tensor, heads: int = 2) -> AttentionView:
    """A view in which the last token pays attention in proportion to `row_S`."""
    S = len(row_S)
    keys = row_S.float().clamp_min(1e-20).log()[None, None, :, None].expand(1, heads, S, 1)
    return AttentionView(torch.ones(1, heads, S, 1), keys, 1.0, visual_N)


def decoder_context(
    view: AttentionView, layer: int, budget: Budget | None = None, **more
) -> DecoderContext:
    """A context in which nothing was dropped since the layer that `view` shows."""
    S = view.q_BHSd.shape[2]
    return DecoderContext(
        budget or Budget(retain=0.5),
        layer=layer,
        **{
            "num_layers": 8,
            "num_visual": len(view.visual_N),
            "num_text": S - len(view.visual_N),
            "visual_N": view.visual_N,
            "attention": {layer - 1: view}.__getitem__,
            "survivors": lambda asked: torch.arange(S),
            **more,
        },
    )
