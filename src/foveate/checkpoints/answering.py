"""A model that is asked the question itself about every frame: how sure it is tells relevance.

Legend: T frames, n windows, w frames of one, R pictures of the clip made of it, V words of the
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.checkpoints.asking import AskingScorer, model_inputs
from foveate.checkpoints.chats import Chat
from foveate.checkpoints.processors import frame_side
from foveate.errors import UnsupportedModelError
from foveate.models.scorer import Scorer
from foveate.video import Frames

Confidence = Literal["logit", "probability", "margin", "rise"]


class AnsweringScorer:
    """Relevance of frames by how sure a video language model is of its answer when it sees them.

    The question is asked as it is about a still clip of every frame (or about windows of
    neighbouring frames), and the distribution of the first word of the answer is read; nothing is
    generated. Where nothing in the picture fits the question, a model hesitates. Needs no training,
    no words of the tokenizer and no second model; it works for models that cannot judge
    relevance or cannot look at a picture, such as the embedded one.

    First every window is shown once, and the likeliest word's probability read; those with the
    largest, `shortlist` of those asked about in one call (64 frames, from `choose_frames`), are
    then shown `repeat` times and get their value from that. All others lie below the lowest of
    these, in their first order.

    It costs a forward call over `window` frames per window, and over `repeat` times as many for
    the shortlist: with the defaults as much as showing every frame three times. It knows nothing
    of answers that need more than a window (order, changes), and a confident model is not always
    right.

    Args:
        model: a transformers video language model; the one that answers afterwards, or another.
        processor: its processor; `foveate.checkpoints.load_model` gives both.
        window: neighbouring frames (of those that a method asks about) that are shown together and
            share one value. 1 tells frames apart best; events that only show in motion need more.
        repeat: how often each is shown in a row, so that a window becomes a clip of a length
            that the model knows. More is surer and costs as much more.
        shortlist: fraction of the windows that are shown so often, in (0, 1]; 1: all, without a
            first look.
        confidence: "logit", the largest one, unnormalised; "probability" of the likeliest word;
            "margin" to the second; or "rise", by how much the logit of the likeliest word exceeds
            its mean on grey, black and white frames.
        size: (height, width) in pixels of the copies that the model is shown; None: the square
            that its processor makes of frames, 224 x 224 where that depends on the frames.
        batch: windows per forward call.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.checkpoints import embedded
        >>> scorer = AnsweringScorer(*embedded(), repeat=4)
        >>> grey = torch.full((3, 3, 64, 64), 127, dtype=torch.uint8)
        >>> scorer.relevance(grey, "where is the star?").shape
        torch.Size([3])

    Source: ours. The largest logit as a measure of what is known: Hendrycks et al.
    (arXiv 1911.11132), there for classes.
    """

    probabilities = False

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        window: int = 1,
        repeat: int = 8,
        shortlist: float = 0.25,
        confidence: Confidence = "logit",
        size: tuple[int, int] | None = None,
        batch: int = 8,
    ) -> None:
        for name, value in (("window", window), ("repeat", repeat), ("batch", batch)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number >= 1, got {value!r}.")
        if not 0 < shortlist <= 1:
            raise ValueError(f"shortlist is a fraction in (0, 1], got {shortlist}.")
        if confidence not in get_args(Confidence):
            known = ", ".join(f'"{name}"' for name in get_args(Confidence))
            raise ValueError(f"confidence must be one of {known}, got {confidence!r}.")
        self.model: Any = model
        self.processor = processor
        self.window, self.repeat, self.batch = window, repeat, batch
        self.shortlist = shortlist
        self.confidence: Confidence = confidence
        side = frame_side(processor) or 224
        self.size = (side, side) if size is None else size
        self._blank: dict[str, Tensor] = {}

    @torch.no_grad()
    def relevance(self, pixels_T3hw: Tensor, question: str) -> Tensor:
        """How sure the model is, float32 [T]; frames of a window share one value.

        Args:
            pixels_T3hw: uint8, windows one behind the other; the last may be shorter.
            question: in words, as it will be asked afterwards.

        Raises:
            ValueError: the question is empty.
        """
        if not question.strip():
            raise ValueError("the question is empty: there is nothing to be sure of.")
        windows = pixels_T3hw.split(self.window)
        num = math.ceil(self.shortlist * len(windows))
        if num == len(windows) or self.repeat == 1:
            value_n = self._sure(self._logits(windows, question, self.repeat), question)
        else:
            glance_n = self._logits(windows, question, 1).softmax(-1).amax(-1)
            best_n = ops.top_k(glance_n, num).tolist()
            chosen = [windows[place] for place in best_n]
            sure_n = self._sure(self._logits(chosen, question, self.repeat), question)
            value_n = sure_n.min() + glance_n - 1
            value_n[best_n] = sure_n
        value_T = value_n.repeat_interleave(self.window)
        return value_T[: len(pixels_T3hw)].cpu()

    def _sure(self, logits_nV: Tensor, question: str) -> Tensor:
        best_n = logits_nV.amax(-1)
        if self.confidence == "logit":
            return best_n
        if self.confidence == "rise":
            word_n = logits_nV.argmax(-1)
            return best_n - self._blank_logits(question)[word_n]
        top_n2 = logits_nV.softmax(-1).topk(2, dim=-1).values
        return top_n2[:, 0] - top_n2[:, 1] if self.confidence == "margin" else top_n2[:, 0]

    def _blank_logits(self, question: str) -> Tensor:
        """Mean logits where there is nothing to see, float32 [V]."""
        if question not in self._blank:
            levels = torch.tensor([0, 127, 255], dtype=torch.uint8)[:, None, None, None, None]
            blank_nw3hw = levels.expand(-1, self.window, 3, *self.size)
            blank_n = tuple(blank_nw3hw)
            self._blank[question] = self._logits(blank_n, question, self.repeat).mean(0)
        return self._blank[question]

    def _logits(self, windows: Sequence[Tensor], question: str, repeat: int) -> Tensor:
        """Logits of the first word of the answer to each window, float32 [n, V]."""
        chats = [self._chat(window, question, repeat) for window in windows]
        logits = []
        for start in range(0, len(chats), self.batch):
            part = chats[start : start + self.batch]
            inputs = model_inputs(self.model, self.processor, part)
            out = self.model(**inputs, use_cache=False, logits_to_keep=1)
            logits.append(out.logits[:, -1].float())
        return torch.cat(logits)

    def _chat(self, pixels_w3hw: Tensor, question: str, repeat: int) -> Chat:
        # A window cut short by the end of the clip goes on with its last frame.
        place_w = torch.arange(self.window).clamp(max=len(pixels_w3hw) - 1)
        place_R = place_w.repeat_interleave(repeat)
        seconds_R = torch.arange(len(place_R), dtype=torch.float64)
        shown = Frames(pixels_w3hw.cpu()[place_R], seconds_R, seconds_R.long())
        content = [{"type": "video"}, {"type": "text", "text": question}]
        return Chat([{"role": "user", "content": content}], videos=[shown])


def own_scorer(model: nn.Module, processor: Any) -> Scorer:
    """The model as its own scorer: its yes where it reads letters, else how sure it is.

    Args:
        model: a transformers vision-language model.
        processor: its processor.

    Example:
        >>> from foveate.checkpoints import embedded
        >>> type(own_scorer(*embedded())).__name__
        'AnsweringScorer'
    """
    kind = "video" if getattr(processor, "image_token", None) is None else "image"
    try:
        return AskingScorer(model, processor, kind=kind)
    except UnsupportedModelError:
        return AnsweringScorer(model, processor)
