"""What a method has seen and wants drawn: one value per token, runs of frames, or boxes.

Legend: N tokens that a stage sees, B images of an encoder's call, M places to read from.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from foveate.core.card import Stage
from foveate.core.grid import Grid
from foveate.core.reduction import Reduction

#: How a piece of evidence is drawn.
EvidenceKind = Literal["heat", "label", "mark", "frames", "boxes"]

_NOTHING: dict[str, Any] = {"heat": torch.nan, "label": -1, "mark": False}
_DTYPES = {"heat": torch.float32, "label": torch.int32, "mark": torch.bool}


@dataclass(frozen=True, eq=False)
class Evidence:
    """One thing that a method noted, in the form of its kind.

    Attributes:
        name: what it is, in the words of the method's paper ("text attention").
        kind: "heat": float32 per token, NaN is nothing; "label": int32 per token (segment, cluster,
            group), -1 is none; "mark": bool per token; "frames": (first, last) planes, inclusive;
            "boxes": (plane, top, left, bottom, right) in cells, bottom and right exclusive.
        value: a tensor on the CPU, or a tuple of tuples.
        caption: a sentence for people.
        method: registry name.
        stage: where it was noted.
        layer: of the encoder or the language model, None elsewhere.
    """

    name: str
    kind: EvidenceKind
    value: Any
    caption: str = ""
    method: str = ""
    stage: Stage | None = None
    layer: int | None = None

    @property
    def is_per_token(self) -> bool:
        """Whether the value has one entry per token."""
        return self.kind in _NOTHING

    @property
    def is_blank(self) -> bool:
        """Whether there is nothing to draw."""
        if not self.is_per_token:
            return not self.value
        return not bool(self.shown.any())

    @property
    def shown(self) -> torch.Tensor:
        """Which tokens have something to draw, bool like the value of a kind per token."""
        if self.kind == "heat":
            return ~self.value.isnan()
        return self.value if self.kind == "mark" else self.value >= 0

    def take(self, index_M: torch.Tensor) -> Evidence:
        """The values at `index_M` of the last dimension, nothing where it is -1.

        Example:
            >>> seen = Evidence("group", "label", torch.tensor([7, 8], dtype=torch.int32))
            >>> seen.take(torch.tensor([1, -1, 0, 1])).value.tolist()
            [8, -1, 7, 8]
        """
        if not self.is_per_token:
            return self
        # The spare last entry is what -1 reads.
        padded = torch.nn.functional.pad(self.value, (0, 1), value=_NOTHING[self.kind])
        index_M = index_M.to("cpu").expand(*self.value.shape[:-1], -1)
        index_M = index_M.where(index_M >= 0, self.value.shape[-1])
        return replace(self, value=padded.gather(-1, index_M))

    def over(self, earlier: Evidence) -> Evidence:
        """Both, where a method notes one thing piece by piece; this one where both say something.

        Raises:
            ValueError: they are not of one name, kind and place.
        """
        if self.key != earlier.key:
            raise ValueError(f"{self.key} and {earlier.key} are not the same evidence.")
        if not self.is_per_token:
            return replace(self, value=(*earlier.value, *self.value))
        return replace(self, value=self.value.where(self.shown, earlier.value))

    @property
    def key(self) -> tuple[Any, ...]:
        """Method, stage, layer, name and kind."""
        return self.method, self.stage, self.layer, self.name, self.kind


@dataclass(frozen=True, eq=False)
class Notebook:
    """Takes what a method notes at one stage, if somebody is going to draw it.

    Attributes:
        stage: the stage.
        shape: of a value with one entry per token that the stage sees: (N,), or (B, N).
        take: gets every piece of evidence, checked and on the CPU.
        layer: of the encoder or the language model.
        grid: layout of the item, by which frames, boxes and values per patch are read; None: they
            cannot be noted here.
        patches: whether the item still has all tokens of its grid, so that a value may be one per
            patch.

    Example:
        >>> seen = []
        >>> book = Notebook("projector", (3,), seen.append)
        >>> book.add("divprune", "distance", torch.tensor([0.5, 0.1, 0.2]))
        >>> seen[0].name, seen[0].kind, seen[0].stage
        ('distance', 'heat', 'projector')
    """

    stage: Stage
    shape: tuple[int, ...]
    take: Callable[[Evidence], None]
    layer: int | None = None
    grid: Grid | None = None
    patches: bool = False

    def add(
        self,
        method: str,
        name: str,
        value: Any,
        kind: EvidenceKind = "heat",
        caption: str = "",
        at: torch.Tensor | None = None,
    ) -> None:
        """Check a value and hand it on; `Context.note` describes the arguments."""
        if kind not in get_args(EvidenceKind):
            raise ValueError(
                f"{method}: note({name!r}) has the kind {kind!r}; known: "
                f"{', '.join(get_args(EvidenceKind))}."
            )
        value = value() if callable(value) else value
        what = f"{method}: note({name!r})"
        if kind in _NOTHING:
            value = self._per_token(what, value, kind, at)
        else:
            value = self._spans(what, value, kind)
        self.take(Evidence(name, kind, value, caption, method, self.stage, self.layer))

    def _per_token(
        self, what: str, value: Any, kind: EvidenceKind, at: torch.Tensor | None
    ) -> torch.Tensor:
        value = torch.as_tensor(value).detach()
        real = not value.is_complex()
        whole = real and not value.is_floating_point() and value.dtype != torch.bool
        if not {"heat": real, "label": whole, "mark": value.dtype == torch.bool}[kind]:
            wanted = {"heat": "numbers", "label": "integers", "mark": "bool"}[kind]
            raise ValueError(f"{what} of the kind {kind!r} takes {wanted}, got {value.dtype}.")
        # A copy of its own: the method's tensors end with the call.
        value = value.to("cpu", _DTYPES[kind], copy=True)
        if kind == "heat":
            value = value.masked_fill(value.isinf(), torch.nan)
        if at is not None:
            return self._placed(what, value, kind, at.cpu())
        if value.shape in (self.shape, (1, *self.shape)):
            return value.reshape(self.shape)
        if self.patches and self.grid is not None and value.numel() == self.grid.num_patches:
            return self._placed(what, value, kind, self.grid.patch_index())
        or_patch = ""
        if self.patches and self.grid is not None:
            or_patch = f", or one per patch, ({self.grid.num_patches},)"
        raise ValueError(
            f"{what} takes one value per token that the {self.stage} stage sees, "
            f"{self.shape}{or_patch}; got {tuple(value.shape)}."
        )

    def _placed(
        self, what: str, value: torch.Tensor, kind: EvidenceKind, at: torch.Tensor
    ) -> torch.Tensor:
        if value.dim() == 0:
            value = value.expand(at.shape)
        outside = bool(((at < 0) | (at >= self.shape[-1])).any())
        if len(self.shape) > 1 or value.numel() != at.numel() or outside:
            raise ValueError(
                f"{what} with `at` takes one value for each of some tokens of {self.shape}; got "
                f"{tuple(value.shape)} for {tuple(at.shape)}" + (" out of range." * outside or ".")
            )
        full = torch.full(self.shape, _NOTHING[kind], dtype=_DTYPES[kind])
        full[at.flatten()] = value.flatten()
        return full

    def _spans(self, what: str, value: Any, kind: EvidenceKind) -> tuple[tuple[int, ...], ...]:
        if self.grid is None:
            raise ValueError(
                f"{what}: {kind!r} speaks of the planes of one item, which the {self.stage} stage "
                "does not know; note a label per token instead."
            )
        width = 2 if kind == "frames" else 5
        rows = value.tolist() if hasattr(value, "tolist") else list(value)
        found = []
        for row in rows:
            entry = tuple(int(number) for number in row)
            if len(entry) != width or not self._is_inside(entry):
                form = "(first, last)" if width == 2 else "(plane, top, left, bottom, right)"
                raise ValueError(
                    f"{what} takes entries {form} within {len(self.grid.planes)} planes of "
                    f"{sorted({(p.height, p.width) for p in self.grid.planes})} cells, got {entry}."
                )
            found.append(entry)
        return tuple(found)

    def _is_inside(self, entry: tuple[int, ...]) -> bool:
        assert self.grid is not None
        planes = self.grid.planes
        if len(entry) == 2:
            return 0 <= entry[0] <= entry[1] < len(planes)
        plane, top, left, bottom, right = entry
        if not 0 <= plane < len(planes):
            return False
        inside = 0 <= top < bottom <= planes[plane].height
        return inside and 0 <= left < right <= planes[plane].width


def merged_groups(reduction: Reduction) -> torch.Tensor:
    """Labels of the tokens that were averaged with others, int64 [B, N]; -1 for all others.

    Example:
        >>> merged_groups(Reduction.merge(torch.tensor([0, 1, 1, -1]), 2)).tolist()
        [[-1, 1, 1, -1]]
    """
    group_BN = reduction.groups_BN
    size_BM = torch.zeros(group_BN.shape[0], reduction.num_out + 1, device=group_BN.device)
    place_BN = group_BN.where(group_BN >= 0, reduction.num_out)
    size_BM.scatter_add_(1, place_BN, torch.ones(group_BN.shape, device=group_BN.device))
    return group_BN.where(size_BM.gather(1, place_BN) > 1, -1)
