"""Dense pre-training of the vision tower: what each patch shows, and where in the frame that is.

A tower that has to learn shapes through one answer word per clip learns slowly. Every patch of
every frame has an exact label in the world, so it learns from those first, before and after the
projector and its pooling: the tokens that the language model will see carry kind, colour, place and
how many things they stand for. Places are those in the frame: a language model that had to infer
them from the order of the tokens learned "where" last of all.

Legend: T frames, H, W pixels, N cells of a frame, K sprites, B frames of a batch, D channels.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from foveate.world import Scene
from foveate.world.vocabulary import COLORS, DIGITS, SHAPES, WORDS

#: Kinds: nothing, each shape, each text of a sign.
KINDS: tuple[str, ...] = ("", *SHAPES, *DIGITS, *WORDS)
_COLORS = tuple(COLORS)
#: A cell shows a sprite when it covers this fraction of it.
_COVERED = 1 / 16
#: Nothing is by far the most frequent kind, and no centre the most frequent number of them.
_NOTHING_WEIGHT = 0.05
#: Numbers of centres in a cell that are told apart: 0, 1, 2, and more.
_CENTRES = 4


def dense_labels(
    scene: Scene, masks_THW: np.ndarray, frames: list[int], cell: int
) -> dict[str, np.ndarray]:
    """What covers each cell most, and how many things have their centre in it.

    Args:
        scene: the scene.
        masks_THW: ids, uint8 [T, H, W].
        frames: numbers of the T frames.
        cell: side of a cell, pixels.

    Returns:
        ``kind`` int64 [T, N] (0: nothing); ``color`` int64 [T, N] (-1: none); ``place`` float32
        [T, N, 2]: the centre of that sprite, or of the cell where there is none, in fractions of
        the frame's width and height; ``centres`` int64 [T, N]: shapes and signs whose centre lies
        in the cell, at most 3.
    """
    T, H, W = masks_THW.shape
    rows, columns = H // cell, W // cell
    count = len(scene.sprites) + 1
    blocks = masks_THW[:, : rows * cell, : columns * cell].reshape(T, rows, cell, columns, cell)
    blocks = blocks.transpose(0, 1, 3, 2, 4).reshape(T * rows * columns, cell * cell)
    offsets = np.arange(len(blocks))[:, None] * count
    area = np.bincount((blocks + offsets).reshape(-1), minlength=len(blocks) * count)
    area = area.reshape(T, rows * columns, count)
    kind_K, color_K = np.zeros(count, dtype=np.int64), np.full(count, -1, dtype=np.int64)
    centers_TK2 = np.full((T, count, 2), -1.0, dtype=np.float32)
    for sprite in scene.sprites:
        if sprite.kind == "speck":
            continue
        kind_K[sprite.id] = KINDS.index(sprite.shape or sprite.text)
        color_K[sprite.id] = _COLORS.index(sprite.color) if sprite.color else -1
        centers_TK2[:, sprite.id] = [
            sprite.center(frame, scene.frames) if sprite.present(frame) else (-1.0, -1.0)
            for frame in frames
        ]
    # Background and specks never win a cell from a sprite that covers enough of it.
    area = area * (kind_K > 0)
    top_TN = area.argmax(axis=2)
    top_TN[area.max(axis=2) < _COVERED * cell * cell] = 0
    grid_y, grid_x = np.mgrid[:rows, :columns]
    cells_N2 = np.stack([(grid_x + 0.5) / columns, (grid_y + 0.5) / rows], axis=-1).reshape(-1, 2)
    places = np.take_along_axis(centers_TK2, top_TN[..., None], axis=1)
    places = np.where(top_TN[..., None] > 0, places, cells_N2.astype(np.float32))
    return {
        "kind": kind_K[top_TN],
        "color": color_K[top_TN],
        "place": places,
        "centres": _count_centres(centers_TK2, rows, columns),
    }


def _count_centres(centers_TK2: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """How many centres lie in each cell, at most `_CENTRES` - 1: int64 [T, N]."""
    T = len(centers_TK2)
    x_TK = np.floor(centers_TK2[..., 0] * columns).astype(np.int64)
    y_TK = np.floor(centers_TK2[..., 1] * rows).astype(np.int64)
    inside_TK = (x_TK >= 0) & (x_TK < columns) & (y_TK >= 0) & (y_TK < rows)
    cell_TK = np.arange(T)[:, None] * rows * columns + y_TK * columns + x_TK
    counted = np.bincount(cell_TK[inside_TK], minlength=T * rows * columns)
    return np.minimum(counted, _CENTRES - 1).reshape(T, rows * columns)


class DenseHead(nn.Module):
    """Linear read-out of kind, colour, place and number of centres from features of D channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, len(KINDS) + len(_COLORS) + 2 + _CENTRES)

    def loss(self, x_BND: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over a batch, and what fraction of kinds and colours is right."""
        out = self.read(self.norm(x_BND)).float()
        kinds, colors, places, centres = out.split([len(KINDS), len(_COLORS), 2, _CENTRES], dim=-1)
        kind_BN, color_BN = labels["kind"], labels["color"]
        colored, shown = color_BN >= 0, kind_BN > 0
        loss = _weighted(kinds, kind_BN) + _weighted(centres, labels["centres"])
        loss = loss + F.cross_entropy(
            colors.flatten(0, 1), color_BN.flatten(), ignore_index=-1, reduction="sum"
        ) / colored.sum().clamp(min=1)
        off = F.smooth_l1_loss(places, labels["place"], beta=0.02, reduction="none").sum(-1)
        weight = torch.where(shown, 1.0, _NOTHING_WEIGHT)
        loss = loss + 8 * (off * weight).sum() / weight.sum()
        with torch.no_grad():
            right = (kinds.argmax(-1) == kind_BN) & shown
            hues = (colors.argmax(-1) == color_BN) & colored
            far = (places - labels["place"]).norm(dim=-1) * shown
        return loss, {
            "kind": right.sum() / shown.sum().clamp(min=1),
            "color": hues.sum() / colored.sum().clamp(min=1),
            "place": far.sum() / shown.sum().clamp(min=1),
            "centres": (centres.argmax(-1) == labels["centres"]).float().mean(),
        }


def _weighted(logits_BNK: Tensor, labels_BN: Tensor) -> Tensor:
    """Cross entropy in which class 0, nothing, counts little."""
    weight = torch.ones(logits_BNK.shape[-1], device=logits_BNK.device)
    weight[0] = _NOTHING_WEIGHT
    return F.cross_entropy(logits_BNK.flatten(0, 1), labels_BN.flatten(), weight)


class DenseHeads(nn.Module):
    """Read-outs of the tower's patches and of the language model's visual tokens."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.patches = DenseHead(vision_width)
        self.tokens = DenseHead(text_width)

    def loss(
        self, features_BPD: Tensor, tokens_BNE: Tensor, labels: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of frames.

        Args:
            features_BPD: the tower's patches.
            tokens_BNE: the language model's visual tokens.
            labels: of `dense_labels`, under "patches" and "tokens".
        """
        on_patches, patch_facts = self.patches.loss(features_BPD, labels["patches"])
        on_tokens, facts = self.tokens.loss(tokens_BNE, labels["tokens"])
        facts |= {f"patch_{name}": value for name, value in patch_facts.items()}
        return on_patches + on_tokens, facts
