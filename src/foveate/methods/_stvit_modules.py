"""The trained parts of STViT: blocks that refine semantic tokens, and one that brings images back.

Legend: B images, N image tokens in raster order, T semantic tokens, W windows, s semantic tokens of
a window, M queries, L tokens they read, C channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from foveate import ops
from foveate.core.windows import ReadingBlock
from foveate.ops.windows import Shape

#: Rows and columns that a window reads on top of its own (kernel 10 for windows of 7).
MARGIN = 3


class CrossAttention(nn.Module):
    """Queries of some tokens, keys and values of others."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_BMC: Tensor, read_BLC: Tensor) -> Tensor:
        """What the queries read, [B, M, C]."""
        q_BHMd = self.q(x_BMC).unflatten(2, (self.heads, -1)).transpose(1, 2)
        k_BHLd, v_BHLd = self.kv(read_BLC).unflatten(2, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        out_BHMd = scaled_dot_product_attention(q_BHMd, k_BHLd, v_BHLd)
        return self.proj(out_BHMd.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class CrossBlock(nn.Module):
    """A transformer block whose tokens may read others; both branches have a learned scale.

    Args:
        width: C.
        heads: of the attention; divides the width.
        hidden: width inside the MLP.
        scale: what the learned scales start with.
        eps: of the norms.

    Raises:
        ValueError: the heads do not divide the width.

    Example:
        >>> block = CrossBlock(8, heads=2, hidden=16)
        >>> block(torch.randn(1, 3, 8), torch.randn(1, 5, 8)).shape
        torch.Size([1, 3, 8])

    Source: STViT (arXiv 2303.08685); parameters are named as in its released code.
    """

    def __init__(
        self, width: int, heads: int, hidden: int, scale: float = 1e-5, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"{heads} heads must divide the width {width}.")
        self.norm1, self.norm2 = (nn.LayerNorm(width, eps=eps) for _ in range(2))
        self.attn, self.mlp = CrossAttention(width, heads), MLP(width, hidden)
        self.layer_scale_1, self.layer_scale_2 = (
            nn.Parameter(torch.full((width,), scale)) for _ in range(2)
        )

    @property
    def inner(self) -> int:
        """Width inside the MLP."""
        return self.mlp.fc1.out_features

    def read(self, x_BMC: Tensor, read_BLC: Tensor) -> Tensor:
        """The attention branch alone: what its tokens read, scaled, [B, M, C]."""
        return self.layer_scale_1 * self.attn(self.norm1(x_BMC), self.norm1(read_BLC))

    def think(self, x_BMC: Tensor) -> Tensor:
        """Tokens behind the MLP branch, [B, M, C]."""
        return x_BMC + self.layer_scale_2 * self.mlp(self.norm2(x_BMC))

    def forward(self, x_BMC: Tensor, read_BLC: Tensor | None = None) -> Tensor:
        """The tokens behind the block; they read `read_BLC`, or one another.

        O(M L C + (M + L) C^2).
        """
        return self.think(x_BMC + self.read(x_BMC, x_BMC if read_BLC is None else read_BLC))

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], heads: int, eps: float = 1e-5
    ) -> CrossBlock:
        """A block with the given weights.

        Raises:
            ValueError: a tensor is missing, or its shape does not fit.
        """
        try:
            hidden, width = tensors["mlp.fc1.weight"].shape
        except KeyError as error:
            raise ValueError(f"A block of stvit needs a tensor {error}.") from None
        block = cls(width, heads, hidden, eps=eps)
        try:
            block.load_state_dict(dict(tensors))
        except RuntimeError as error:
            raise ValueError(f"These are not the tensors of a block of stvit: {error}") from None
        return block


class Steps(NamedTuple):
    """What a group makes of image tokens, one after the other; None where it has no such block.

    Attributes:
        pooled_WsC: the windows' largest values, [B * W, s, C].
        refined_BTC: behind the first block, in raster order.
        centres_BTC: behind the second.
        local_BTC: behind the block inside windows.
        semantic_BTC: the tokens in the end.
        recovered_BNC: image tokens again.
    """

    pooled_WsC: Tensor
    refined_BTC: Tensor
    centres_BTC: Tensor
    local_BTC: Tensor | None
    semantic_BTC: Tensor
    recovered_BNC: Tensor | None


class SemanticGroup(nn.Module):
    """One group of STViT-R: image tokens to semantic tokens, some blocks on those, and back.

    Args:
        stgm1: refines pooled windows by what lies in and around each.
        stgm2: refines all of them by the whole image.
        local: attention inside the semantic tokens of a window.
        glob: attention among all semantic tokens.
        recover: image tokens read semantic tokens.
        global_tokens: learned centres [1, T, C], added before `stgm2`.
        window: rows and columns of a window.
        cells: semantic tokens of a window, rows and columns.
        residual: the pooled tokens are added behind the first attention.

    Example:
        >>> blocks = {n: CrossBlock(8, 2, 16) for n in ("stgm1", "stgm2", "recover")}
        >>> group = SemanticGroup(**blocks, window=(4, 4), cells=(2, 2))
        >>> steps = group.steps(torch.randn(1, 64, 8), (8, 8))
        >>> tuple(steps.semantic_BTC.shape), tuple(steps.recovered_BNC.shape)
        ((1, 16, 8), (1, 64, 8))

    Source: STViT (arXiv 2303.08685), and its released code.
    """

    def __init__(
        self,
        stgm1: ReadingBlock,
        stgm2: ReadingBlock,
        local: ReadingBlock | None = None,
        glob: ReadingBlock | None = None,
        recover: ReadingBlock | None = None,
        global_tokens: Tensor | None = None,
        window: Shape = (7, 7),
        cells: Shape = (3, 3),
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.stgm1, self.stgm2, self.local, self.glob = stgm1, stgm2, local, glob
        self.recover = recover
        self.global_tokens = None if global_tokens is None else nn.Parameter(global_tokens)
        self.window, self.cells, self.residual = window, cells, residual

    def forward(self, x_BNC: Tensor, plane: Shape) -> Tensor:
        """Image tokens [B, N, C] where there is a block that recovers them, else semantic ones."""
        steps = self.steps(x_BNC, plane)
        return steps.semantic_BTC if steps.recovered_BNC is None else steps.recovered_BNC

    def steps(self, x_BNC: Tensor, plane: Shape) -> Steps:
        """All that the group makes of image tokens in raster order.

        Raises:
            ValueError: the windows do not fill the plane, or there are more or fewer centres than
                semantic tokens.
        """
        counts = ops.windows_of(plane, self.window)
        whole = counts[0] * self.cells[0], counts[1] * self.cells[1]
        pooled_WsC = ops.pool_windows(x_BNC, plane, self.window, self.cells)
        refined_BTC = self._refined(x_BNC, pooled_WsC, plane, whole)
        centred_BTC = refined_BTC
        if self.global_tokens is not None:
            if self.global_tokens.shape[1] != refined_BTC.shape[1]:
                raise ValueError(
                    f"{self.global_tokens.shape[1]} learned centres for {refined_BTC.shape[1]} "
                    f"semantic tokens of a plane of {plane[0]} x {plane[1]}."
                )
            centred_BTC = refined_BTC + self.global_tokens
        centres_BTC = self.stgm2(centred_BTC, torch.cat([refined_BTC, x_BNC], dim=1))
        local_BTC, last_BTC = None, centres_BTC
        if self.local is not None:
            inside_WsC = ops.cut_windows(last_BTC, whole, self.cells)
            local_BTC = last_BTC = ops.join_windows(self.local(inside_WsC), whole, self.cells)
        if self.glob is not None:
            last_BTC = self.glob(last_BTC)
        recovered_BNC = None if self.recover is None else self.recover(x_BNC, last_BTC)
        return Steps(pooled_WsC, refined_BTC, centres_BTC, local_BTC, last_BTC, recovered_BNC)

    def _refined(self, x_BNC: Tensor, pooled_WsC: Tensor, plane: Shape, whole: Shape) -> Tensor:
        """Pooled windows behind the first block, in raster order over the plane."""
        index_Wk = ops.surroundings(plane, self.window, MARGIN).to(x_BNC.device)
        around_WkC = x_BNC[:, index_Wk].flatten(0, 1)
        read_WsC = self.stgm1.read(pooled_WsC, torch.cat([pooled_WsC, around_WkC], dim=1))
        refined_WsC = pooled_WsC + read_WsC if self.residual else read_WsC
        return self.stgm1.think(ops.join_windows(refined_WsC, whole, self.cells))


def blocks_from_tensors(
    tensors: Mapping[str, Tensor], heads: int, eps: float = 1e-5
) -> tuple[dict[str, CrossBlock], Tensor | None]:
    """The blocks of a file by name (stgm1, stgm2, local, glob, recover), and the learned centres.

    Args:
        tensors: named as released inside a block, and by the block's name in front.
        heads: of every attention, which no shape tells.
        eps: of the norms.

    Raises:
        ValueError: a block is incomplete, there is none at all, or a name is unknown.

    Example:
        >>> block = CrossBlock(8, 2, 16)
        >>> tensors = {f"recover.{k}": v for k, v in block.state_dict().items()}
        >>> list(blocks_from_tensors(tensors, heads=2)[0])
        ['recover']
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        block, _, rest = name.partition(".")
        if name != "global_tokens":
            parts.setdefault(block, {})[rest] = value
    known = ("stgm1", "stgm2", "local", "glob", "recover")
    unknown = sorted(set(parts) - set(known))
    if unknown or not tensors:
        raise ValueError(
            f"stvit knows global_tokens and the blocks {', '.join(known)}; found "
            f"{', '.join(unknown) or 'no tensor'}."
        )
    blocks = {name: CrossBlock.from_tensors(parts[name], heads, eps) for name in parts}
    return blocks, tensors.get("global_tokens")
