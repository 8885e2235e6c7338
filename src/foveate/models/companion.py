"""A model that puts text and pictures into one space, beside the model that is reduced.

Legend: T pictures, P patches of one of them, h rows and w columns of these, C channels of the
vision encoder, E channels of the common space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize

from foveate.errors import UnsupportedModelError
from foveate.models.tower import pair

#: What CLIP was trained with; used when the processor does not say.
MEAN, STD = (0.4815, 0.4578, 0.4082), (0.2686, 0.2613, 0.2758)
#: Where a chat template leads over to the answer.
_LEAD = re.compile(r"\s*\b(assistant|gpt)\s*:?\s*$", re.IGNORECASE)


class Companion:
    """A dual encoder (CLIP, SigLIP or alike) that tells how well text and pictures fit.

    Methods guided by the text read its scores with the signals "text.frame_similarity" and
    "text.patch_similarity". It runs once per visual item, in batches, and is never changed. It is
    also a `foveate.Scorer`: methods that choose frames read the cosine of the question with each.

    Args:
        model: a transformers model with `get_text_features` and `get_image_features`.
        processor: its processor, or an object with its `tokenizer` and, if that is known,
            `image_processor` with `image_mean` and `image_std` (default: those of CLIP).
        decode: turns token ids of the language model into text: its tokenizer or processor, or a
            function from a list of ids to text.
        batch: pictures per forward call.

    Raises:
        UnsupportedModelError: the model has no such methods, or says no image size.
        ValueError: there is no tokenizer, nothing to decode with, or the batch is below 1.

    Example:
        >>> clip = foveate.Companion(model, processor, decode=tokenizer)       # doctest: +SKIP
        >>> foveate.reduce(llava, "free_video_llm", companion=clip)            # doctest: +SKIP
    """

    probabilities = False

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        decode: Any,
        *,
        batch: int = 32,
    ) -> None:
        config: Any = getattr(model, "config", None)
        vision: Any = getattr(config, "vision_config", None)
        missing = [
            name for name in ("get_text_features", "get_image_features") if not hasattr(model, name)
        ]
        if missing or not hasattr(vision, "image_size"):
            what = f"no {' and no '.join(missing)}" if missing else "no vision_config.image_size"
            raise UnsupportedModelError(
                f"A companion is a model of text and pictures such as CLIPModel or SiglipModel; "
                f"{type(model).__name__} has {what}."
            )
        self.tokenizer = getattr(processor, "tokenizer", processor)
        if not callable(self.tokenizer):
            raise ValueError(
                f"A companion needs the tokenizer of its model; {type(processor).__name__} has "
                "none. Pass the processor or the tokenizer."
            )
        self._decode = _decoder(decode)
        if batch < 1:
            raise ValueError(f"batch must be at least 1 picture, got {batch}.")
        self.model: Any = model
        self.size = pair(vision.image_size)
        images = getattr(processor, "image_processor", None)
        self.mean = tuple(getattr(images, "image_mean", None) or MEAN)
        self.std = tuple(getattr(images, "image_std", None) or STD)
        self.batch = batch
        self.limit = getattr(getattr(config, "text_config", None), "max_position_embeddings", None)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids of the language model, without special tokens and without the role name
        that leads over to the answer.

        Raises:
            ValueError: the decoder does not give text.
        """
        text = self._decode(list(ids))
        if not isinstance(text, str):
            raise ValueError(f"decode must give text, got {type(text).__name__}.")
        return _LEAD.sub("", text).strip()

    @torch.no_grad()
    def embed_text(self, text: str) -> Tensor:
        """A text in the common space, float32 [1, E]; cut to what the text encoder takes."""
        device = next(self.model.parameters()).device
        limit = {} if self.limit is None else {"truncation": True, "max_length": self.limit}
        # SigLIP reads the state at the last place, and was trained on texts padded to the end.
        padding = "max_length" if limit and hasattr(self.model, "logit_bias") else False
        inputs = self.tokenizer([text], padding=padding, return_tensors="pt", **limit)
        names = [name for name in ("input_ids", "attention_mask") if name in inputs]
        if padding:
            names = ["input_ids"]
        out = self.model.get_text_features(**{name: inputs[name].to(device) for name in names})
        return _pooled(out).float()

    @torch.no_grad()
    def embed(self, pixels_T3hw: Tensor) -> Tensor:
        """Pictures in the common space, float32 [T, E] of length 1; as `embed_pictures` has them.

        Raises:
            ValueError: the pictures have another form.
        """
        _check_pictures(pixels_T3hw)
        parts = [_pooled(self._encoded(part)) for part in pixels_T3hw.split(self.batch)]
        return normalize(torch.cat(parts).float(), dim=-1)

    def relevance(self, pixels_T3hw: Tensor, question: str) -> Tensor:
        """Cosine of a question with every picture, float32 [T]; see `foveate.Scorer`."""
        text_1E = normalize(self.embed_text(question), dim=-1)
        return (self.embed(pixels_T3hw) @ text_1E.mT)[:, 0]

    @torch.no_grad()
    def embed_pictures(self, pixels_T3hw: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures and their patches in the common space, float32 [T, E] and [T, h, w, E].

        Patches of CLIP go through its visual projection without the norm before it, as methods do
        that were published with it; patches of models with a pooling head through that head, each
        alone.

        Args:
            pixels_T3hw: uint8 [T, 3, height, width] of any size; stretched to the model's square.

        Raises:
            ValueError: the pictures have another form.
            UnsupportedModelError: the model gives no states of patches.
        """
        _check_pictures(pixels_T3hw)
        parts = [self._forward(part) for part in pixels_T3hw.split(self.batch)]
        pooled, patches = zip(*parts, strict=True)
        return torch.cat(pooled), torch.cat(patches)

    def _encoded(self, pixels_T3hw: Tensor) -> Any:
        return self.model.get_image_features(pixel_values=self._normalised(pixels_T3hw))

    def _normalised(self, pixels_T3hw: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        x = pixels_T3hw.to(weight.device, torch.float32)
        x = interpolate(x, self.size, mode="bicubic", align_corners=False, antialias=True)
        mean, std = (x.new_tensor(values)[:, None, None] for values in (self.mean, self.std))
        return ((x.clamp(0, 255) / 255 - mean) / std).to(weight.dtype)

    def _forward(self, pixels_T3hw: Tensor) -> tuple[Tensor, Tensor]:
        x = self._normalised(pixels_T3hw)
        out = self.model.get_image_features(pixel_values=x)
        states = getattr(out, "last_hidden_state", None)
        if states is None:  # transformers < 5 returns the pooled features alone
            states = self.model.vision_model(pixel_values=x).last_hidden_state
        return _pooled(out).float(), self._patches(states).float()

    def _patches(self, states_TPC: Tensor) -> Tensor:
        patch = pair(self.model.config.vision_config.patch_size)
        h, w = (side // p for side, p in zip(self.size, patch, strict=True))
        prefix = states_TPC.shape[1] - h * w
        if prefix < 0:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} gives {states_TPC.shape[1]} states for {h} x {w} "
                "patches, so they cannot be compared with text one by one."
            )
        states_TPC = states_TPC[:, prefix:]
        head = getattr(getattr(self.model, "vision_model", None), "head", None)
        if hasattr(self.model, "visual_projection"):
            states_TPC = self.model.visual_projection(states_TPC)
        elif head is not None:
            states_TPC = head(states_TPC.flatten(0, 1)[:, None]).view(*states_TPC.shape[:2], -1)
        return states_TPC.unflatten(1, (h, w))


def _decoder(decode: Any) -> Callable[[list[int]], Any]:
    decode = getattr(decode, "tokenizer", decode)
    if hasattr(decode, "decode"):
        return lambda ids: decode.decode(ids, skip_special_tokens=True)
    if callable(decode):
        return decode
    raise ValueError(
        f"decode must be the language model's tokenizer or processor, or a function from ids to "
        f"text, got {type(decode).__name__}."
    )


def _check_pictures(pixels_T3hw: Tensor) -> None:
    if pixels_T3hw.dim() != 4 or pixels_T3hw.shape[1] != 3 or not len(pixels_T3hw):
        raise ValueError(
            f"pictures must be uint8 [T, 3, height, width], got {pixels_T3hw.dtype} "
            f"{tuple(pixels_T3hw.shape)}."
        )


def _pooled(out: Any) -> Tensor:
    return out if isinstance(out, Tensor) else out.pooler_output
