"""Dense pre-training of the vision tower: what each patch shows, and where its centre lies.

A tower that has to learn shapes through one answer word per clip learns slowly. Every patch of
every frame has an exact label in the world, so it learns from those first, before and after the
projector and its pooling: the tokens that the language model will see carry kind, colour and place.

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
#: Nothing is by far the most frequent kind.
_NOTHING_WEIGHT = 0.05


def dense_labels(
    scene: Scene, masks_THW: np.ndarray, frames: list[int], cell: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What covers each cell most.

    Args:
        scene: the scene.
        masks_THW: ids, uint8 [T, H, W].
        frames: numbers of the T frames.
        cell: side of a cell, pixels.

    Returns:
        kinds int64 [T, N] (0: nothing), colours int64 [T, N] (-1: none) and places float32
        [T, N, 2]: from the cell's centre to the sprite's, in fractions of the frame.
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
    centers_TK2 = np.zeros((T, count, 2), dtype=np.float32)
    for sprite in scene.sprites:
        if sprite.kind == "speck":
            continue
        kind_K[sprite.id] = KINDS.index(sprite.shape or sprite.text)
        color_K[sprite.id] = _COLORS.index(sprite.color) if sprite.color else -1
        centers_TK2[:, sprite.id] = [sprite.center(frame, scene.frames) for frame in frames]
    # Background and specks never win a cell from a sprite that covers enough of it.
    area = area * (kind_K > 0)
    top_TN = area.argmax(axis=2)
    top_TN[area.max(axis=2) < _COVERED * cell * cell] = 0
    grid_y, grid_x = np.mgrid[:rows, :columns]
    cells_N2 = np.stack([(grid_x + 0.5) / columns, (grid_y + 0.5) / rows], axis=-1).reshape(-1, 2)
    places = np.take_along_axis(centers_TK2, top_TN[..., None], axis=1) - cells_N2
    return kind_K[top_TN], color_K[top_TN], places.astype(np.float32)


class DenseHead(nn.Module):
    """Linear read-out of kind, colour and place from features of D channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.read = nn.Linear(width, len(KINDS) + len(_COLORS) + 2)

    def loss(self, x_BND: Tensor, labels: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Mean loss over a batch, and what fraction of kinds and colours is right."""
        out = self.read(self.norm(x_BND)).float()
        kinds, colors, places = out.split([len(KINDS), len(_COLORS), 2], dim=-1)
        kind_BN, color_BN = labels["kind"], labels["color"]
        weight = torch.ones(len(KINDS), device=out.device)
        weight[0] = _NOTHING_WEIGHT
        loss = F.cross_entropy(kinds.flatten(0, 1), kind_BN.flatten(), weight)
        colored, shown = color_BN >= 0, kind_BN > 0
        loss = loss + F.cross_entropy(
            colors.flatten(0, 1), color_BN.flatten(), ignore_index=-1, reduction="sum"
        ) / colored.sum().clamp(min=1)
        off = F.smooth_l1_loss(places, labels["place"], beta=0.02, reduction="none").sum(-1)
        loss = loss + 8 * (off * shown).sum() / shown.sum().clamp(min=1)
        with torch.no_grad():
            right = (kinds.argmax(-1) == kind_BN) & shown
            hues = (colors.argmax(-1) == color_BN) & colored
            far = (places - labels["place"]).norm(dim=-1) * shown
        return loss, {
            "kind": right.sum() / shown.sum().clamp(min=1),
            "color": hues.sum() / colored.sum().clamp(min=1),
            "place": far.sum() / shown.sum().clamp(min=1),
        }


class DenseHeads(nn.Module):
    """Read-outs of the tower's patches and of the language model's visual tokens."""

    def __init__(self, vision_width: int, text_width: int) -> None:
        super().__init__()
        self.patches = DenseHead(vision_width)
        self.tokens = DenseHead(text_width)

    def loss(self, model: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss of a batch of frames: {"pixels" float [B, C, H, W], "patches", "tokens": labels}."""
        inner = model.model
        features = inner.vision_tower(batch["pixels"], output_hidden_states=True).hidden_states[-1]
        on_patches, patch_facts = self.patches.loss(features, batch["patches"])
        tokens = inner.apply_pooling(inner.multi_modal_projector(features))
        on_tokens, facts = self.tokens.loss(tokens, batch["tokens"])
        facts |= {f"patch_{name}": value for name, value in patch_facts.items()}
        return on_patches + on_tokens, facts
