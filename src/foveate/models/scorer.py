"""What tells methods of the frames stage how well frames fit a question.

Legend: T frames, E channels of a scorer's space.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Scorer(Protocol):
    """Relevance of frames to a question.

    `foveate.Companion` is one (a dual encoder: cosine), `foveate.AskingScorer` another (a model's
    own yes), `foveate.AnsweringScorer` a third (how sure a model is of its answer), and any object
    with these three is. `foveate.choose_frames` keeps what they say per clip, so that a frame is
    decoded and looked at once.

    A scorer that has to see several frames together has a fourth, `window`: how many neighbours
    of a request belong together. It is shown whole windows then, one behind the other, and only
    the last of a request may be shorter.

    Attributes:
        size: (height, width) in pixels of the copies that it is shown.
        probabilities: whether `relevance` lies in [0, 1] as a probability does; if not, it is a
            cosine or another number whose differences count.

    Example:
        >>> class Redness:
        ...     size, probabilities = (8, 8), True
        ...     def relevance(self, pixels_T3hw, question):
        ...         return pixels_T3hw[:, 0].float().mean((1, 2)) / 255
        >>> isinstance(Redness(), Scorer)
        True
    """

    size: tuple[int, int]
    probabilities: bool

    def relevance(self, pixels_T3hw: Tensor, question: str) -> Tensor:
        """How well every frame fits, float32 [T], larger is better; pixels uint8 [T, 3, h, w]."""
        ...


def window_of(scorer: Scorer) -> int:
    """Frames that a scorer must see together; 1 unless it says otherwise.

    Raises:
        ValueError: it says something else than a whole number of at least 1.
    """
    window = getattr(scorer, "window", 1)
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise ValueError(
            f"{type(scorer).__name__}.window must be a whole number >= 1, got {window!r}."
        )
    return window


@runtime_checkable
class EmbeddingScorer(Scorer, Protocol):
    """A scorer whose pictures have places in a space with text: they serve every question."""

    def embed(self, pixels_T3hw: Tensor) -> Tensor:
        """Places of pictures, float32 [T, E] of length 1."""
        ...

    def embed_text(self, text: str) -> Tensor:
        """The place of a text, float32 [1, E]."""
        ...
