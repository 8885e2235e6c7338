"""What happened to every patch of an item, as arrays that can be drawn.

Legend: N tokens of an item, M tokens after reduction, H, W rows and columns of a plane, P planes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from foveate.core.grid import Grid, TokenKind
from foveate.core.report import ItemReport

DROPPED = -1


@dataclass(frozen=True, eq=False)
class PlaneView:
    """One plane: which token absorbed each of its patches.

    Attributes:
        group_HW: int64 [H, W], the token (0..M-1) that stands for the patch, -1 when dropped.
        anchor_HW: bool [H, W], whether the patch gives its token the place in the grid.
        merged_HW: bool [H, W], whether its token stands for more than one patch.
        first: index of the plane's first patch among all patches of the item.
    """

    group_HW: np.ndarray
    anchor_HW: np.ndarray
    merged_HW: np.ndarray
    first: int = 0

    @property
    def num_patches(self) -> int:
        return self.group_HW.size

    @property
    def num_tokens(self) -> int:
        """Tokens that have their place in this plane."""
        return int(self.anchor_HW.sum())

    @property
    def num_dropped(self) -> int:
        return int((self.group_HW == DROPPED).sum())

    @property
    def num_merged(self) -> int:
        return int(self.merged_HW.sum())


@dataclass(frozen=True, eq=False)
class ItemView:
    """One item, ready to draw.

    Attributes:
        planes: one entry per plane of the grid.
        num_groups: M.
        colour_M: int64 [M], number of each merged group in drawing order, -1 for single patches.
        specials: (name, kept, before) of the tokens that stand for no pixels.
        segments: (first, last) plane of every run of frames that a method noted, inclusive; empty
            when there are none.
        segment_name: what the method calls them.
        seconds: time of every plane's first frame, or None.
        alive: (decoder layer, bool [M] of the tokens that survive it), ascending.
    """

    planes: tuple[PlaneView, ...]
    num_groups: int
    colour_M: np.ndarray
    specials: tuple[tuple[str, int, int], ...] = ()
    segments: tuple[tuple[int, int], ...] = ()
    segment_name: str = "segments"
    seconds: tuple[float, ...] | None = None
    alive: tuple[tuple[int, np.ndarray], ...] = field(default=())

    @property
    def num_colours(self) -> int:
        """Merged groups."""
        return int(self.colour_M.max(initial=-1)) + 1

    @property
    def groups(self) -> np.ndarray:
        """The token of every patch, plane after plane, int64 [patches]."""
        return np.concatenate([plane.group_HW.ravel() for plane in self.planes])


def view_item(item: ItemReport) -> ItemView:
    """Read an item's reduction into arrays; O(N + M)."""
    grid = item.grid
    kind_N = grid.kinds().numpy()
    group_N, anchor_M = _groups(item, grid.num_tokens)
    patch_P = np.flatnonzero(kind_N == TokenKind.PATCH)
    num_groups = len(anchor_M)
    kept_P = group_N[patch_P]
    size_M = np.bincount(kept_P[kept_P >= 0], minlength=num_groups)
    merged_M = size_M > 1
    is_anchor_N = np.zeros(grid.num_tokens + 1, dtype=bool)
    is_anchor_N[anchor_M] = True  # -1, no provenance, marks the spare last entry
    planes, first = [], 0
    for plane in grid.planes:
        index = patch_P[first : first + plane.num_patches]
        shape = (plane.height, plane.width)
        group_HW = group_N[index].reshape(shape)
        merged_HW = (
            (group_HW >= 0) & merged_M[np.maximum(group_HW, 0)]
            if num_groups
            else (np.zeros(shape, dtype=bool))
        )
        planes.append(PlaneView(group_HW, is_anchor_N[index].reshape(shape), merged_HW, first))
        first += plane.num_patches
    return ItemView(
        planes=tuple(planes),
        num_groups=num_groups,
        colour_M=_colour_numbers(kept_P, merged_M),
        specials=_specials(kind_N, group_N),
        segments=_segments(item.segments, len(grid.planes)),
        segment_name=next((x.name for x in item.evidence if x.kind == "frames"), "segments"),
        seconds=_plane_seconds(item.seconds, grid),
        alive=_alive(item, num_groups),
    )


def frame_of_plane(plane: int, num_planes: int, num_frames: int) -> int:
    """The first frame that a plane shows, when planes cover equal runs of frames.

    The last run may be short: processors fill it up with the last frame.

    Example:
        >>> [frame_of_plane(p, 3, 5) for p in range(3)], frame_of_plane(1, 2, 1)
        ([0, 2, 4], 0)
    """
    return min(plane * -(-num_frames // num_planes), num_frames - 1)


def _groups(item: ItemReport, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    if item.reduction is None:
        order_N = np.arange(num_tokens)
        return order_N, order_N
    if item.reduction.batch != 1 or item.reduction.num_in != num_tokens:
        raise ValueError(
            f"The item's grid has {num_tokens} tokens, its reduction is for "
            f"{item.reduction.batch} x {item.reduction.num_in}; expected 1 x {num_tokens}."
        )
    group_N = item.reduction.groups_BN[0].cpu().numpy()
    return group_N, item.reduction.anchor_BM[0].cpu().numpy()


def _colour_numbers(group_P: np.ndarray, merged_M: np.ndarray) -> np.ndarray:
    """Merged groups numbered by their first patch, so that neighbours get neighbouring numbers."""
    colour_M = np.full(len(merged_M), -1)
    seen, first = np.unique(group_P, return_index=True)
    is_coloured = (seen >= 0) & merged_M[np.maximum(seen, 0)] if len(merged_M) else seen < -1
    order = seen[is_coloured][np.argsort(first[is_coloured])]
    colour_M[order] = np.arange(len(order))
    return colour_M


def _specials(kind_N: np.ndarray, group_N: np.ndarray) -> tuple[tuple[str, int, int], ...]:
    found = []
    for kind, name in ((TokenKind.NEWLINE, "newline"), (TokenKind.CLS, "[CLS]")):
        is_kind_N = kind_N == kind
        if is_kind_N.any():
            found.append((name, int((group_N[is_kind_N] >= 0).sum()), int(is_kind_N.sum())))
    return tuple(found)


def _segments(value: Any, num_planes: int) -> tuple[tuple[int, int], ...]:
    """Segments as methods note them; what does not fit the planes is left out of the picture."""
    if value is None or len(value) == 0:
        return ()
    pairs = [(int(first), int(last)) for first, last in value]
    return tuple(pair for pair in pairs if 0 <= pair[0] <= pair[1] < num_planes)


def _plane_seconds(seconds: Sequence[float] | None, grid: Grid) -> tuple[float, ...] | None:
    if seconds is None or len(seconds) == 0:
        return None
    count = len(grid.planes)
    return tuple(float(seconds[frame_of_plane(p, count, len(seconds))]) for p in range(count))


def _alive(item: ItemReport, num_groups: int) -> tuple[tuple[int, np.ndarray], ...]:
    steps = []
    for layer, index in sorted(item.alive.items()):
        alive_M = np.zeros(num_groups, dtype=bool)
        alive_M[np.asarray(index.cpu() if hasattr(index, "cpu") else index, dtype=np.int64)] = True
        steps.append((layer, alive_M))
    return tuple(steps)
