"""What a scorer has seen of a clip: every frame is decoded for it and looked at once.

Legend: n frames asked for, E channels of the scorer's space, h, w pixels of a copy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.nn.functional import normalize

from foveate.errors import DamagedVideoWarning
from foveate.models.scorer import EmbeddingScorer, Scorer, window_of
from foveate.video import Clip
from foveate.video.resize import resize

#: Frames that a scorer is shown at a time, so that an hour of them never lies in memory at once.
CHUNK = 64
#: Most bytes of small copies that are kept for later questions about the same clip.
KEPT_BYTES = 128 << 20
#: Side of the pictures that stand in for a scorer's space.
SMALL = 8

Window = tuple[int, ...]


@dataclass(eq=False)
class _Memory:
    place_E: dict[int, Tensor] = field(default_factory=dict)
    copy_3hw: dict[int, Tensor] = field(default_factory=dict)
    answer: dict[str, dict[Window, list[float]]] = field(default_factory=dict)


#: Forgotten with the clip or the scorer, whichever goes first.
_SEEN: WeakKeyDictionary[Clip, WeakKeyDictionary[Scorer, _Memory]] = WeakKeyDictionary()


class Looks:
    """The frames of one clip through the eyes of one scorer.

    Frames are decoded as a stream of small copies, a chunk at a time, while the scorer is at work
    on the chunk before. A scorer with a space looks at a frame once for all questions; of any
    other, answers are kept per question, and copies as long as they fit into `KEPT_BYTES`: a
    question about frames beyond that decodes them anew. What was seen is kept as long as clip and
    scorer live.

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
        self.window = window_of(scorer)
        self.seen = _SEEN.setdefault(clip, WeakKeyDictionary()).setdefault(scorer, _Memory())

    def relevance(self, index_n: Tensor, question: str) -> Tensor:
        """How well frames fit a question, float32 [n].

        A scorer with a `window` is asked about so many neighbours of this request together.

        Raises:
            ValueError: the scorer gives no finite number per frame.
        """
        if isinstance(self.scorer, EmbeddingScorer):
            text_1E = normalize(self.scorer.embed_text(question).float().cpu(), dim=-1)
            return (self.embeddings(index_n) @ text_1E.mT)[:, 0]
        answers = self.seen.answer.setdefault(question, {})
        windows = _split(sorted(set(index_n.tolist())), self.window)
        for part, copy_n3hw in self._copies([one for one in windows if one not in answers]):
            ranks = _joined(part)
            value_n = self.scorer.relevance(copy_n3hw, question)
            values = iter(_checked(value_n, len(ranks), self.scorer))
            answers.update({one: [next(values) for _ in one] for one in part})
            self._place(ranks, copy_n3hw)
        value = {
            rank: value for one in windows for rank, value in zip(one, answers[one], strict=True)
        }
        return torch.tensor([value[rank] for rank in index_n.tolist()], dtype=torch.float32)

    def embeddings(self, index_n: Tensor) -> Tensor:
        """Frames in the scorer's space, or small pictures in its place, float32 [n, E]."""
        places = self.seen.place_E
        missing = sorted(set(index_n.tolist()) - places.keys())
        for part, copy_n3hw in self._copies(_split(missing, 1)):
            self._place(_joined(part), copy_n3hw)
        return torch.stack([places[rank] for rank in index_n.tolist()])

    def _place(self, ranks: list[int], copy_n3hw: Tensor) -> None:
        """Note where frames lie in the scorer's space, or what they look like from afar."""
        if isinstance(self.scorer, EmbeddingScorer):
            place_nE = self.scorer.embed(copy_n3hw)
        else:
            place_nE = resize(copy_n3hw, (SMALL, SMALL)).flatten(1).float()
            place_nE = place_nE - place_nE.mean(1, keepdim=True)
        place_nE = normalize(place_nE.float().cpu(), dim=-1)
        # Rows of their own: a view would keep the whole chunk alive.
        self.seen.place_E.update(zip(ranks, (row_E.clone() for row_E in place_nE), strict=True))

    def _copies(self, windows: list[Window]) -> Iterator[tuple[list[Window], Tensor]]:
        """Windows of frames, a chunk of them at a time, with their copies uint8 [n, 3, h, w]."""
        total, done = sum(map(len, windows)), 0
        step = max(1, CHUNK // self.window)
        if self.progress is not None and total:
            self.progress(0, total)
        kept = self.seen.copy_3hw
        # A scorer that fails must not leave decoders at work.
        with closing(self._decoded(windows)) as fresh:
            for start in range(0, len(windows), step):
                part = windows[start : start + step]
                copy_n3hw = torch.stack(
                    [kept[rank] if rank in kept else next(fresh) for rank in _joined(part)]
                )
                yield part, copy_n3hw
                self._keep(_joined(part), copy_n3hw)
                done += len(copy_n3hw)
                if self.progress is not None:
                    self.progress(done, total)

    def _decoded(self, windows: list[Window]) -> Generator[Tensor]:
        """Copies of the frames that are not kept, in order, decoded a chunk ahead."""
        ranks = [rank for rank in _joined(windows) if rank not in self.seen.copy_3hw]
        if not ranks:
            return
        with self.clip.stream(index=ranks, chunk=CHUNK, ahead=1, size=self.scorer.size) as stream:
            for _ in range(len(stream)):
                with warnings.catch_warnings():
                    # The frames that are shown report their damage; these only help to choose.
                    warnings.simplefilter("ignore", DamagedVideoWarning)
                    copy_n3hw = next(stream).pixels.cpu()
                yield from copy_n3hw

    def _keep(self, ranks: list[int], copy_n3hw: Tensor) -> None:
        if isinstance(self.scorer, EmbeddingScorer):
            return  # Their places serve every question.
        kept = self.seen.copy_3hw
        room = KEPT_BYTES // max(copy_n3hw[0].nbytes, 1) - len(kept)
        fresh = [place for place, rank in enumerate(ranks) if rank not in kept][: max(room, 0)]
        kept.update({ranks[place]: copy_n3hw[place].clone() for place in fresh})


def _split(ranks: list[int], window: int) -> list[Window]:
    return [tuple(ranks[start : start + window]) for start in range(0, len(ranks), window)]


def _joined(windows: list[Window]) -> list[int]:
    return [rank for one in windows for rank in one]


def _checked(value_n: Tensor, num: int, scorer: Scorer) -> list[float]:
    if value_n.shape != (num,) or not bool(value_n.isfinite().all()):
        raise ValueError(
            f"{type(scorer).__name__}.relevance must give one finite number per frame, [{num}], "
            f"got {tuple(value_n.shape)}: {value_n.flatten()[:8].tolist()}."
        )
    return value_n.float().tolist()
