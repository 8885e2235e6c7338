"""What a scorer has seen of a clip: every frame is decoded for it and looked at once.

Legend: n frames asked for, E channels of the scorer's space.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.errors import DamagedVideoWarning
from foveate.models.scorer import EmbeddingScorer, Scorer
from foveate.video import Clip
from foveate.video.resize import resize

#: Frames that are decoded at a time, so that an hour of them never lies in memory at once.
CHUNK = 64
#: Side of the pictures that stand in for a scorer's space.
SMALL = 8


@dataclass(eq=False)
class _Memory:
    place_E: dict[int, Tensor] = field(default_factory=dict)
    copy_3hw: dict[int, Tensor] = field(default_factory=dict)
    answer: dict[str, dict[int, float]] = field(default_factory=dict)


#: Forgotten with the clip or the scorer, whichever goes first.
_SEEN: WeakKeyDictionary[Clip, WeakKeyDictionary[Scorer, _Memory]] = WeakKeyDictionary()


class Looks:
    """The frames of one clip through the eyes of one scorer.

    A scorer with a space looks at a frame once for all questions; of any other, frames are kept as
    small copies, and answers per question. What was seen is kept as long as clip and scorer live.

    Args:
        clip: where frames come from.
        scorer: what looks at them.
        progress: called with how many frames of a request were looked at, and how many there are.

    Example:
        >>> class Brightness:
        ...     size, probabilities = (4, 4), True
        ...     def relevance(self, pixels_T3hw, question):
        ...         return pixels_T3hw.float().mean((1, 2, 3)) / 255
        >>> clip = Clip(torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)]).mul(255).byte())
        >>> Looks(clip, Brightness()).relevance(torch.tensor([1, 0]), "").tolist()
        [1.0, 0.0]
    """

    def __init__(
        self,
        clip: Clip,
        scorer: Scorer,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if not isinstance(scorer, Scorer):
            raise ValueError(
                "a scorer has size, probabilities and relevance(pixels, question), such as "
                f"foveate.Companion; {type(scorer).__name__} has not."
            )
        self.clip, self.scorer, self.progress = clip, scorer, progress
        self.seen = _SEEN.setdefault(clip, WeakKeyDictionary()).setdefault(scorer, _Memory())

    def relevance(self, index_n: Tensor, question: str) -> Tensor:
        """How well frames fit a question, float32 [n].

        Raises:
            ValueError: the scorer gives no finite number per frame.
        """
        if isinstance(self.scorer, EmbeddingScorer):
            text_1E = normalize(self.scorer.embed_text(question).float().cpu(), dim=-1)
            return (self.embeddings(index_n) @ text_1E.mT)[:, 0]
        answers = self.seen.answer.setdefault(question, {})
        for part in self._missing(index_n, answers):
            value_n = self.scorer.relevance(self._copies(part), question)
            answers.update(zip(part, _checked(value_n, len(part), self.scorer), strict=True))
        return torch.tensor([answers[rank] for rank in index_n.tolist()], dtype=torch.float32)

    def embeddings(self, index_n: Tensor) -> Tensor:
        """Frames in the scorer's space, or small pictures in its place, float32 [n, E]."""
        places = self.seen.place_E
        for part in self._missing(index_n, places):
            if isinstance(self.scorer, EmbeddingScorer):
                place_nE = self.scorer.embed(_decoded(self.clip, part, self.scorer.size))
            else:
                place_nE = resize(self._copies(part), (SMALL, SMALL)).flatten(1).float()
                place_nE = place_nE - place_nE.mean(1, keepdim=True)
            places.update(zip(part, normalize(place_nE.float().cpu(), dim=-1), strict=True))
        return torch.stack([places[rank] for rank in index_n.tolist()])

    def _missing(self, index_n: Tensor, known: dict[int, Any]) -> Iterator[list[int]]:
        """Frames not looked at yet, a few at a time."""
        missing = sorted(set(index_n.tolist()) - known.keys())
        for start in range(0, len(missing), CHUNK):
            yield missing[start : start + CHUNK]
            if self.progress is not None:
                self.progress(min(start + CHUNK, len(missing)), len(missing))

    def _copies(self, ranks: list[int]) -> Tensor:
        copies = self.seen.copy_3hw
        missing = [rank for rank in ranks if rank not in copies]
        if missing:
            copies.update(zip(missing, _decoded(self.clip, missing, self.scorer.size), strict=True))
        return torch.stack([copies[rank] for rank in ranks])


def _decoded(clip: Clip, ranks: list[int], size: tuple[int, int]) -> Tensor:
    with warnings.catch_warnings():
        # The frames that are shown report their damage; these only help to choose.
        warnings.simplefilter("ignore", DamagedVideoWarning)
        return clip.take(ranks, size=size).pixels.cpu()


def _checked(value_n: Tensor, num: int, scorer: Scorer) -> list[float]:
    if value_n.shape != (num,) or not bool(value_n.isfinite().all()):
        raise ValueError(
            f"{type(scorer).__name__}.relevance must give one finite number per frame, [{num}], "
            f"got {tuple(value_n.shape)}: {value_n.flatten()[:8].tolist()}."
        )
    return value_n.float().tolist()
