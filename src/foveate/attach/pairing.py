"""How well the instruction fits what a visual item shows: signals of the "paired" space.

Legend: T planes of an item, N tokens of it, S tokens of the instruction, D channels of the language
model, E channels of the space, h rows and w columns of a plane.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from foveate import ops
from foveate.core import Grid, TokenKind
from foveate.errors import AttachmentError
from foveate.models.companion import Companion

FRAME, PATCH = "text.frame_similarity", "text.patch_similarity"
TEXT, FRAMES, PATCHES = "paired.text", "paired.frames", "paired.patches"
PAIRED_SIGNALS = (FRAME, PATCH, TEXT, FRAMES, PATCHES)
#: Those with one entry per token of the item.
PER_TOKEN = (PATCH, PATCHES)


@dataclass
class Pairing:
    """Text and picture of one visual item in one space; nothing is computed before it is read.

    Attributes:
        grid: layout of the item.
        x_1ND: its projected features.
        instruction_1SD: embeddings of the text behind the last visual token.
        ids: ids of that text, or None when the call passed embeddings only.
        pixels: gives the item's planes as uint8 [T, 3, height, width]; None: unknown.
        companion: gives the space; None: that of the language model's embeddings is taken.
        known: what the companion has made in this call: items share a text, beams the pictures.

    Example:
        >>> grid = Grid.video(2, 1, 2)
        >>> x = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [1, 1]]])
        >>> Pairing(grid, x, torch.tensor([[[0.0, 3.0]]])).read("text.patch_similarity").tolist()
        [[0.0, 0.0, 1.0, 0.7071067690849304]]
    """

    grid: Grid
    x_1ND: torch.Tensor
    instruction_1SD: torch.Tensor
    ids: torch.Tensor | None = None
    pixels: Callable[[], torch.Tensor] | None = None
    companion: Companion | None = None
    known: dict[Hashable, Any] = field(default_factory=dict)

    def read(self, name: str) -> torch.Tensor | None:
        """A signal of `PAIRED_SIGNALS`, or None for other names.

        Raises:
            AttachmentError: a companion is there, but not the ids or pixels that it reads.
        """
        if name == TEXT:
            return self.text_1E
        if name == FRAMES:
            return self.frames_1TE
        if name == PATCHES:
            return self.patches_1NE
        if name == FRAME:
            return self._cosine(self.frames_1TE)
        return self._cosine(self.patches_1NE) if name == PATCH else None

    @cached_property
    def text_1E(self) -> torch.Tensor:
        """The instruction."""
        if self.companion is None:
            return self.instruction_1SD.float().mean(1)
        if self.ids is None:
            raise AttachmentError(
                "The companion reads the instruction from token ids, and this call passes "
                "inputs_embeds: pass input_ids."
            )
        ids = tuple(self.ids.tolist())
        if ids not in self.known:
            self.known[ids] = self.companion.embed_text(self.companion.decode(ids))
        return self.known[ids].to(self.x_1ND.device)

    @property
    def frames_1TE(self) -> torch.Tensor:
        """Every plane as a whole."""
        return self._visual[0]

    @property
    def patches_1NE(self) -> torch.Tensor:
        """Every token; NaN for newlines and [CLS]."""
        return self._visual[1]

    @cached_property
    def _visual(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.companion is None:
            return self._features()
        if self.pixels is None:
            raise AttachmentError("The companion needs the pixels of the item, which are unknown.")
        device, grid = self.x_1ND.device, self.grid
        pixels = self.pixels()
        key = ("pictures", pixels.data_ptr(), tuple(pixels.shape))
        if key not in self.known:
            self.known[key] = self.companion.embed_pictures(pixels)
        frames_TE, states_ThwE = self.known[key]
        if len(frames_TE) != len(grid.planes):
            raise AttachmentError(
                f"The item has {len(grid.planes)} planes, its pixels {len(frames_TE)}."
            )
        shapes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for number, plane in enumerate(grid.planes):
            shapes[plane.height, plane.width].append(number)
        patches: dict[int, torch.Tensor] = {}
        for shape, numbers in shapes.items():
            resized_TPE = _resize(states_ThwE[numbers], shape)
            patches.update(zip(numbers, resized_TPE, strict=True))
        patch_PE = torch.cat([patches[number] for number in range(len(grid.planes))])
        patches_1NE = torch.full((1, grid.num_tokens, patch_PE.shape[1]), torch.nan, device=device)
        patches_1NE[0, grid.patch_index(device)] = patch_PE.to(device)
        return frames_TE[None].to(device), patches_1NE

    def _features(self) -> tuple[torch.Tensor, torch.Tensor]:
        x_ND, grid = self.x_1ND[0].float(), self.grid
        patch_P = grid.patch_index(x_ND.device)
        plane_P = grid.positions(x_ND.device)[patch_P, 0]
        frames_1TD = ops.scatter_mean(x_ND[None, patch_P], plane_P[None], len(grid.planes))
        is_special_N = grid.kinds(x_ND.device) != TokenKind.PATCH
        return frames_1TD, x_ND.masked_fill(is_special_N[:, None], torch.nan)[None]

    def _cosine(self, visual_1NE: torch.Tensor) -> torch.Tensor:
        return ops.cosine_similarity_matrix(visual_1NE, self.text_1E[:, None])[..., 0]


def _resize(states_ThwE: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """Patches of another grid: means where it is coarser, interpolated where it is finer."""
    if tuple(states_ThwE.shape[1:3]) == shape:
        return states_ThwE.flatten(1, 2)
    x_TEhw = states_ThwE.permute(0, 3, 1, 2)
    if shape[0] <= x_TEhw.shape[2] and shape[1] <= x_TEhw.shape[3]:
        x_TEhw = adaptive_avg_pool2d(x_TEhw, shape)
    else:
        x_TEhw = interpolate(x_TEhw, shape, mode="bilinear", align_corners=False)
    return x_TEhw.flatten(2).mT
