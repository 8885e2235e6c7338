"""STViT: a vision transformer whose deep blocks run on a few semantic tokens of every image.

Legend: B images, H heads, M tokens present (prefix included), N image tokens of one of them, T
semantic tokens, d head channels, C channels of the stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import scaled_dot_product_attention

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    EncoderContext,
    Method,
    Reduction,
    Tokens,
    blocks_run,
    merged_groups,
)
from foveate.core.windows import WindowContext, WindowStep
from foveate.methods._stvit_modules import CrossBlock, SemanticGroup, blocks_from_tensors
from foveate.methods._stvit_windows import ROLES, cell_middles, group_step, group_tensors
from foveate.methods.pool import pooled_shape

#: Semantic tokens of a window of STViT-R: 3 x 3 of 7 x 7.
PUBLISHED_SHARE = 9 / 49

__all__ = ["CrossBlock", "STViT", "SemanticGroup", "blocks_from_tensors", "semantic_reduction"]


@lru_cache(maxsize=8)
def _load(
    path: Path,
    changed: int,
    heads: int,
    eps: float,
    device: torch.device,
    dtype: torch.dtype,
    group: int | None,
) -> tuple[dict[str, CrossBlock], torch.Tensor | None]:
    """The blocks and centres of a file; `changed` makes a rewritten file another one."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"stvit: {path} is no safetensors file: {error}") from error
    if group is not None:
        tensors = group_tensors(tensors, group)
        if not tensors:
            return {}, None
    blocks, centres_1TC = blocks_from_tensors(tensors, heads, eps)
    for block in blocks.values():
        block.requires_grad_(False).to(device, dtype)
    return blocks, None if centres_1TC is None else centres_1TC.to(device, dtype)


def semantic_reduction(
    x_BMC: torch.Tensor, prefix: int, plane: tuple[int, int], cells: tuple[int, int]
) -> Reduction:
    """Image tokens pooled to cells by their channels' largest values, prefix tokens unchanged.

    What a cell pools feeds it in equal shares; its place is that of its middle.

    Args:
        x_BMC: all tokens of the images.
        prefix: tokens in front of the image's.
        plane: rows and columns of the image tokens.
        cells: rows and columns of cells.

    Example:
        >>> made = semantic_reduction(torch.randn(2, 17, 8), 1, (4, 4), (2, 2))
        >>> made, made.anchor_BM[0].tolist()
        (Reduction(synthesise, 2 x (17 -> 5)), [0, 6, 8, 14, 16])
    """
    B, M, _ = x_BMC.shape
    pooled_BTC = ops.pool_windows(x_BMC[:, prefix:], plane, plane, cells)
    share_TN = ops.cell_shares(plane, plane, cells).to(x_BMC.device)
    eye = torch.eye(prefix, device=x_BMC.device)
    matrix_MM = torch.block_diag(eye, share_TN) if prefix else share_TN
    anchor_T = cell_middles(plane, plane, cells) + prefix
    anchor_M = torch.cat([torch.arange(prefix), anchor_T]).to(x_BMC.device)
    return Reduction.synthesise(
        torch.cat([x_BMC[:, :prefix], pooled_BTC], dim=1),
        M,
        matrix_MM.expand(B, -1, -1),
        anchor_M.expand(B, -1),
    )


@dataclass(frozen=True)
class STViT(Method):
    """STViT: image tokens become cluster centres, and deeper blocks run on these alone.

    After some blocks the image is pooled to a grid of cells. In the next block the cells read
    themselves and all image tokens, in the one behind it once more, and from then on they are
    alone. [CLS] and other prefix tokens go with them. `retain` says how many cells.

    Without weights those two blocks are the encoder's own, with more to read. With weights there
    may be learned centres, trained blocks in their place, and a block with which image tokens read
    semantic ones: what STViT-R recovers dense features by, where full length is wanted. Without
    that, features are un-merged.

    On Swin it is STViT-R: of every six blocks of the longest stage the first runs on image tokens,
    two make semantic tokens of every window, one runs on those of a window, one on all of them, and
    with the last the image tokens read them. The plane is whole again for what comes behind.

    Args:
        weights: a safetensors file with any of `global_tokens`, `stgm1.`, `stgm2.` and `recover.`,
            named as released inside a block; None: training-free. For Swin also `local.` and
            `glob.`; those of several groups have `groups.0.`, `groups.1.`, ... in front.
        after: blocks on image tokens: a number, or a fraction of the depth; not for Swin.
        num_heads: attention heads of the blocks in `weights`; 0: one for every 64 channels, or as
            many as Swin's own blocks have.
        eps: of their norms.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> STViT().blocks(12), STViT(after=3).blocks(8)
        ((4, 5), (3, 4))

    Source: arXiv 2303.08685; details from the released code of STViT-R.
    """

    weights: str | None = None
    after: int | float = 1 / 3
    num_heads: int = 0
    eps: float = 1e-5

    card: ClassVar[Card] = Card(
        name="stvit",
        title="STViT",
        paper="Making Vision Transformers Efficient from A Token Sparsification View",
        arxiv="2303.08685",
        year=2023,
        url="https://github.com/changsn/STViT-R",
        licence="MIT",
        stages=("encoder",),
        kind="trained",
        summary="Pools the image to a few semantic tokens that read it twice and go through the "
        "deep blocks alone; a block can recover the image from them.",
        defaults={
            "STViT DeiT-T, S, B at 224": "16 semantic tokens of 196",
            "STViT Swin-T, S, B": "16 per window of 7 x 7",
            "STViT-R Swin-S, B": "9 per window of 7 x 7, 36 of 196, recovered after 6 blocks",
        },
        headline=(
            "DeiT with 16 semantic tokens: accuracy kept at more than twice the speed and nearly "
            "60 % fewer FLOPs (abstract)",
            "STViT-R: Swin-S 82.7, Swin-B 83.2 top-1 (README); more than 30 % fewer FLOPs of the "
            "backbone for detection and segmentation (abstract)",
        ),
        notes=(
            "Published models are trained as a whole, and only Swin's were released. Used without "
            "training is ours: the encoder's own blocks stand in for the trained ones, and none of "
            "the published accuracy is to be expected.",
            "Where the two blocks stand in DeiT is not published: after 4 of 12 is ours.",
            "Pooling is over the whole image, one window; on transformers' SwinModel it is over "
            "every window, in groups of six blocks with recovery, as in STViT-R. The rest of the "
            "encoder stays Swin's own (the published one has a convolutional stem).",
            "Swin without weights: five blocks of a group lend their norms, projections and MLPs; "
            "their tables of relative positions speak of image tokens and are left out. Blocks "
            "behind the last whole group run as ever. This is ours.",
            "Pooled tokens keep their residual and learned centres are used, as in the paper; the "
            "released defaults switch both off.",
            "[CLS] and other prefix tokens are not pooled, read what semantic tokens read, and "
            "stay beside them.",
            "A budget that is no rectangle of cells gets the largest one below it. Weights with "
            "learned centres are for as many cells as those, whatever the default budget.",
            "What image tokens cost while they are read is in the report's FLOPs.",
            "STViT-R recovers inside the network and goes on; except on Swin, the trained block "
            "recovers behind the last one, from the image tokens as they were before pooling.",
        ),
        retain=16 / 196,
    )
    reads_values: ClassVar[bool] = True
    encoder_point: ClassVar = ("block_start", "block_end")
    window_group: ClassVar[int] = 6

    def __post_init__(self) -> None:
        if not self.after > 0:
            raise ValueError(f"after must be above 0 blocks, got {self.after}.")
        if isinstance(self.num_heads, bool) or self.num_heads < 0 or not self.eps > 0:
            raise ValueError(
                f"num_heads must be at least 0 and eps above 0, got {self.num_heads}, {self.eps}."
            )

    def blocks(self, num_layers: int) -> tuple[int, int]:
        """The two 0-based blocks in which semantic tokens read the image.

        Raises:
            ValueError: the encoder has fewer blocks.
        """
        after = blocks_run(self.after, num_layers)
        if after + 2 > num_layers:
            raise ValueError(
                f"after = {self.after}: two blocks must follow, and this encoder has {num_layers}."
            )
        return after, after + 1

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when there are too few blocks, or no file of that name."""
        if num_encoder_layers is not None:
            self.blocks(num_encoder_layers)
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            raise ValueError(f"stvit: there is no file weights={self.weights!r}.")

    # -- in the two blocks ----------------------------------------------------------------------

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Pool before the first of the two blocks; put trained tokens in place behind each."""
        at = (context.layer, context.point)
        first, second = self.blocks(context.num_layers)
        x_BMC, state, prefix = tokens.x_BND, context.state, context.num_prefix
        if at == (first, "block_start"):
            return self._pool(tokens, context)
        if context.layer not in (first, second) or "image" not in state:
            return None
        blocks, centres_1TC = self._trained(x_BMC)
        if at == (second, "block_start"):
            state["query"] = x_BMC
            if centres_1TC is None:
                return None
            # What is read of the semantic tokens knows nothing of the centres.
            state["read"] = torch.cat([x_BMC[:, prefix:], state["image"]], dim=1)
            state["own"] = prefix
            centred_BTC = x_BMC[:, prefix:] + centres_1TC
            state["query"] = torch.cat([x_BMC[:, :prefix], centred_BTC], dim=1)
            return _in_place(state["query"])
        block = blocks.get("stgm1" if context.layer == first else "stgm2")
        if context.point == "block_start" or block is None:
            return None
        query_BMC = state["query"]
        read_BLC = torch.cat([query_BMC[:, : state["own"]], state["read"]], dim=1)
        return _in_place(block(query_BMC, read_BLC))

    def encoder_attention(self, context: EncoderContext) -> torch.Tensor | None:
        """Let semantic tokens read the image, too, with the block's own weights. O(M L C)."""
        first, second = self.blocks(context.num_layers)
        state = context.state
        if context.layer not in (first, second) or "read" not in state:
            return None
        trained = self._trained(state["image"])[0]
        if ("stgm1" if context.layer == first else "stgm2") in trained:
            return None
        q_BHMd, k_BHMd, v_BHMd = context.queries_BHNd, context.keys_BHNd, context.values_BHNd
        assert q_BHMd is not None and k_BHMd is not None and v_BHMd is not None
        own, (k_BHLd, v_BHLd) = state["own"], context.keys_values(state["read"])
        k_BHLd = torch.cat([k_BHMd[:, :, :own], k_BHLd], dim=2)
        v_BHLd = torch.cat([v_BHMd[:, :, :own], v_BHLd], dim=2)
        return scaled_dot_product_attention(q_BHMd, k_BHLd, v_BHLd)

    def encoder_restore(self, x_BMD: torch.Tensor, context: EncoderContext) -> torch.Tensor | None:
        """Image tokens that read the semantic ones, where a trained block does it."""
        image_BNC, prefix = context.state.get("image"), context.num_prefix
        if image_BNC is None or (block := self._trained(x_BMD)[0].get("recover")) is None:
            return None
        recovered_BNC = block(image_BNC, x_BMD[:, prefix:])
        return torch.cat([x_BMD[:, :prefix], recovered_BNC], dim=1)

    def _pool(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        prefix, x_BMC, state = context.num_prefix, tokens.x_BND, context.state
        N = x_BMC.shape[1] - prefix
        side = round(N**0.5)
        plane = context.plane or (side, side)
        if tokens.mask_BN is not None or tokens.reduction is not None or plane[0] * plane[1] != N:
            raise ValueError(
                f"stvit pools whole planes of patches, and {N} tokens of an image are no plane of "
                f"{plane[0]} x {plane[1]}: no other method can shorten the encoder before it."
            )
        cells = self._cells(plane, plane, self._trained(x_BMC)[1], context.budget)
        if cells[0] * cells[1] >= N:
            return None
        reduction = semantic_reduction(x_BMC, prefix, plane, cells)
        assert reduction.features_BMD is not None
        state["query"], state["own"] = reduction.features_BMD, reduction.num_out
        state["image"] = state["read"] = x_BMC[:, prefix:]
        context.note("groups", lambda: merged_groups(reduction), "label", "pooled together")
        return reduction

    # -- on windows ------------------------------------------------------------------------------

    def encoder_windows(self, x_BNC: torch.Tensor, context: WindowContext) -> WindowStep | None:
        """Five blocks of a group on semantic tokens of windows, image tokens again behind them."""
        if self.after != STViT.after:
            raise ValueError(
                f"after = {self.after}: on Swin the first of every six blocks runs on image "
                "tokens, as published; leave after out."
            )
        plane, window = context.plane, context.window
        trained, centres_1TC = self._trained(x_BNC, context.num_heads, context.group)
        cells = self._cells(plane, window, centres_1TC, context.budget, PUBLISHED_SHARE)
        if cells == window:
            return None
        blocks = dict(zip(ROLES, context.blocks, strict=True)) | trained
        step = group_step(x_BNC, plane, window, cells, blocks, centres_1TC)
        context.note("groups", lambda: merged_groups(step.reduction), "label", "pooled together")
        return step

    # -- semantic tokens and weights -------------------------------------------------------------

    def _cells(
        self,
        plane: tuple[int, int],
        window: tuple[int, int],
        centres_1TC: torch.Tensor | None,
        budget: Budget,
        published: float | None = None,
    ) -> tuple[int, int]:
        """Rows and columns of semantic tokens in a window."""
        size = window[0] * window[1]
        windows = plane[0] * plane[1] // size
        keep = budget.count(windows * size) // windows
        if published is not None and budget.published:
            keep = round(published * size)
        if centres_1TC is None:
            return pooled_shape(*window, max(1, keep))
        num = centres_1TC.shape[1]
        if budget.published:
            keep = num // windows
        cells = pooled_shape(*window, max(1, keep))
        if cells[0] * cells[1] * windows == num:
            return cells
        raise ValueError(
            f"The weights {self.weights} have {num} learned centres; {max(1, keep) * windows} "
            f"semantic tokens of a plane of {plane[0]} x {plane[1]} were asked for."
        )

    def _trained(
        self, x_BMC: torch.Tensor, heads: int = 0, group: int | None = None
    ) -> tuple[dict[str, CrossBlock], torch.Tensor | None]:
        """The blocks and the learned centres of the weights, or of one group of them."""
        if self.weights is None:
            return {}, None
        self.check(None, None)
        path, width = Path(self.weights).expanduser().resolve(), x_BMC.shape[2]
        heads = self.num_heads or heads or max(1, width // 64)
        blocks, centres_1TC = _load(
            path, path.stat().st_mtime_ns, heads, self.eps, x_BMC.device, x_BMC.dtype, group
        )
        widths = {len(block.layer_scale_1) for block in blocks.values()}
        widths |= set() if centres_1TC is None else {centres_1TC.shape[2]}
        if widths - {width}:
            raise ValueError(
                f"The weights {self.weights} are for an encoder of width {sorted(widths)}; this "
                f"one's is {width}."
            )
        return blocks, centres_1TC


def _in_place(x_BMC: torch.Tensor) -> Reduction:
    """Other features for the same tokens."""
    B, M, _ = x_BMC.shape
    order_M = torch.arange(M, device=x_BMC.device)
    eye_MM = torch.eye(M, device=x_BMC.device)
    return Reduction.synthesise(x_BMC, M, eye_MM.expand(B, -1, -1), order_M.expand(B, -1))
