"""A model that is asked of every frame whether it helps to answer a question.

Legend: T frames, V words of the vocabulary.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from foveate.checkpoints.chats import Chat, prepare_chats
from foveate.errors import UnsupportedModelError
from foveate.methods.quota import decouple_query
from foveate.video import Frames

#: Of a question without objects, and of one with; the answers are named behind it.
ENOUGH = "Question: {question}\nDoes the image contain sufficient information to answer?"
OBJECTS = "Does the image contain any object of {objects}?"
CHOICE = "\nA. yes\nB. no\nAnswer with the letter."


class AskingScorer:
    """Relevance of a frame by a vision-language model's own yes: the probability of its "A".

    Any model of a known family will do, the one that answers afterwards or a smaller one. One
    forward call per `batch` frames and question; nothing is generated but the list of objects.

    Args:
        model: a transformers vision-language model.
        processor: its processor; `foveate.checkpoints.load_model` gives both.
        objects: first ask the model, in words alone, which objects the question is about, and then
            look for these (QuoTA's query decoupling); a question without any is asked as it is.
        normalise: over the two answers; False: the softmax over all words, as published.
        kind: "image", or "video" for models that take no images: a clip of one frame.
        size: (height, width) in pixels of the copies that the model is shown.
        batch: frames per forward call.

    Raises:
        UnsupportedModelError: its tokenizer has no tokens "A" and "B".
        ValueError: kind or batch is out of range.

    Example:
        >>> scorer = foveate.AskingScorer(model, processor)                     # doctest: +SKIP
        >>> foveate.choose_frames(clip, "quota", question, scorer=scorer)       # doctest: +SKIP

    Source: QuoTA (arXiv 2503.08689), frame scores; the wording is ours.
    """

    probabilities = True

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        *,
        objects: bool = False,
        normalise: bool = False,
        kind: str = "image",
        size: tuple[int, int] = (224, 224),
        batch: int = 8,
    ) -> None:
        if kind not in ("image", "video"):
            raise ValueError(f'kind must be "image" or "video", got {kind!r}.')
        if batch < 1:
            raise ValueError(f"batch must be at least 1 frame, got {batch}.")
        self.model: Any = model
        self.processor = processor
        self.objects, self.normalise, self.kind = objects, normalise, kind
        self.size, self.batch = size, batch
        self._answers = [_token(processor.tokenizer, answer) for answer in ("A", "B")]
        self._prompts: dict[str, str] = {}

    @torch.no_grad()
    def relevance(self, pixels_T3hw: Tensor, question: str) -> Tensor:
        """The probability of "A" as the next word, float32 [T]."""
        text = self._prompt(question)
        return torch.cat([self._asked(part, text) for part in pixels_T3hw.split(self.batch)])

    @torch.no_grad()
    def generate(self, text: str, max_new_tokens: int = 256) -> str:
        """What the model says to a text without pictures, greedily."""
        turns = [{"role": "user", "content": [{"type": "text", "text": text}]}]
        inputs = model_inputs(self.model, self.processor, [Chat(turns)])
        inputs = {name: inputs[name] for name in ("input_ids", "attention_mask")}
        with warnings.catch_warnings():
            # A checkpoint's own sampling settings do not matter here.
            warnings.simplefilter("ignore", UserWarning)
            ids = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new_ids = ids[0, inputs["input_ids"].shape[1] :]
        return self.processor.tokenizer.decode(new_ids, skip_special_tokens=True)

    def _prompt(self, question: str) -> str:
        if question not in self._prompts:
            found = decouple_query(question, self.generate) if self.objects else ()
            asked = OBJECTS.format(objects=", ".join(found)) if found else ENOUGH
            self._prompts[question] = asked.replace("{question}", question) + CHOICE
        return self._prompts[question]

    def _asked(self, pixels_n3hw: Tensor, text: str) -> Tensor:
        chats = [self._chat(pixels_13hw, text) for pixels_13hw in pixels_n3hw[:, None]]
        inputs = model_inputs(self.model, self.processor, chats)
        logits_nV = self.model(**inputs, use_cache=False).logits[:, -1].float()
        if self.normalise:
            return logits_nV[:, self._answers].softmax(-1)[:, 0].cpu()
        return logits_nV.softmax(-1)[:, self._answers[0]].cpu()

    def _chat(self, pixels_13hw: Tensor, text: str) -> Chat:
        content = [{"type": self.kind}, {"type": "text", "text": text}]
        chat = Chat([{"role": "user", "content": content}])
        if self.kind == "image":
            from PIL import Image

            chat.images.append(Image.fromarray(pixels_13hw[0].permute(1, 2, 0).cpu().numpy()))
        else:
            seconds = torch.zeros(1, dtype=torch.float64)
            chat.videos.append(Frames(pixels_13hw, seconds, torch.zeros(1, dtype=torch.int64)))
        return chat


def model_inputs(model: nn.Module, processor: Any, chats: Sequence[Chat]) -> dict[str, Tensor]:
    """Inputs for chats of one layout, on the model's device and in its dtype."""
    like = next(model.parameters())
    inputs = prepare_chats(processor, chats)
    inputs.pop("batch_num_images", None)
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in inputs.items()
    }


def _token(tokenizer: Any, answer: str) -> int:
    ids = tokenizer.encode(answer, add_special_tokens=False)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise UnsupportedModelError(
            f"The tokenizer has no token {answer!r}, so the model cannot be asked for a letter; "
            "use foveate.AnsweringScorer, a foveate.Companion, or another model as the scorer."
        )
    return int(ids[0])
