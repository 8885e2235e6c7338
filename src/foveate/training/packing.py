"""Many questions about one clip in one sequence.

The visual tokens are nine tenths of a prompt, so a clip's questions share them: every question
attends to the clip and to itself, at the positions it would have alone. The result equals asking
them one at a time (tested), at a fraction of the cost.

Legend: B clips, L tokens of a packed row, V visual tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from foveate.training.model import IDS, normalise
from foveate.world.tokenizer import ANSWER, END, PAD, USER, VIDEO, make_tokenizer

#: What asks for a caption.
DESCRIBE = "describe the clip ."


@dataclass(frozen=True)
class Exchange:
    """A question and its answer as token ids; `weight` scales its loss."""

    question: tuple[int, ...]
    answer: tuple[int, ...]
    weight: float = 1.0


@lru_cache(maxsize=1)
def _tokenizer() -> Any:
    return make_tokenizer()


@lru_cache(maxsize=1 << 14)
def encode(text: str) -> tuple[int, ...]:
    """Token ids of a text."""
    return tuple(_tokenizer()(text).input_ids)


def exchange(question: str, answer: str, weight: float = 1.0) -> Exchange:
    """A question and its answer, encoded."""
    return Exchange(encode(question), encode(answer), weight)


def pack(rows: Sequence[Sequence[Exchange]], visual_tokens: int) -> dict[str, Tensor]:
    """Pack the exchanges of each clip behind its visual tokens.

    Args:
        rows: exchanges of each of B clips.
        visual_tokens: V; their places hold the video token.

    Returns:
        int64 [B, L]: ``ids``; ``positions``; ``segments`` (0 for the shared beginning, 1, 2, ...
        for the exchanges, -1 for padding); ``labels`` (the token that each position should
        predict, or -100); float [B, L] ``weights``; and bool [B, L] ``first``: labels that are the
        first word of an answer.
    """
    start = [IDS[USER], *[IDS[VIDEO]] * visual_tokens]
    packed = []
    for exchanges in rows:
        ids, positions = list(start), list(range(len(start)))
        segments, labels = [0] * len(start), [-100] * len(start)
        weights, first = [0.0] * len(start), [False] * len(start)
        for number, one in enumerate(exchanges, start=1):
            tokens = [*one.question, IDS[ANSWER], *one.answer, IDS[END]]
            ahead = len(one.question)
            ids += tokens[:-1]
            positions += range(len(start), len(start) + len(tokens) - 1)
            segments += [number] * (len(tokens) - 1)
            labels += [-100] * ahead + tokens[ahead + 1 :]
            weights += [one.weight] * (len(tokens) - 1)
            first += [place == ahead for place in range(len(tokens) - 1)]
        packed.append((ids, positions, segments, labels, weights, first))
    fills = (IDS[PAD], 0, -1, -100, 0.0, False)
    names = ("ids", "positions", "segments", "labels", "weights", "first")
    longest = max(len(row[0]) for row in packed)
    return {
        name: torch.tensor([row[place] + [fill] * (longest - len(row[0])) for row in packed])
        for place, (name, fill) in enumerate(zip(names, fills, strict=True))
    }


def packed_mask(segments_BL: Tensor) -> Tensor:
    """Which token may look at which: bool [B, 1, L, L]; O(B L^2)."""
    length = segments_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=segments_BL.device).tril()
    keys = segments_BL[:, None, :]
    return (causal_LL & ((keys == 0) | (keys == segments_BL[:, :, None])))[:, None]


def visual_tokens(model: Any, frames_BTHWC: Tensor, *, frozen: bool = False) -> Tensor:
    """A clip's tokens as the language model gets them, the closing one included: [B, V, D].

    What `get_video_features` computes, with the tower outside of the gradient when it is frozen.

    Args:
        model: a `LlavaOnevisionForConditionalGeneration`.
        frames_BTHWC: pixels, uint8.
        frozen: whether the tower is left out of the gradient.
    """
    _, tokens_BNE = frame_tokens(model, frames_BTHWC.flatten(0, 1), frozen=frozen)
    return join_frames(model, tokens_BNE, len(frames_BTHWC))


def frame_tokens(model: Any, frames_BHWC: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor]:
    """The tower's patches and the language model's tokens of single frames: [B, P, D], [B, N, E].

    Args:
        model: a `LlavaOnevisionForConditionalGeneration`.
        frames_BHWC: pixels, uint8.
        frozen: whether the tower is left out of the gradient.
    """
    inner = model.model
    with torch.set_grad_enabled(torch.is_grad_enabled() and not frozen):
        out = inner.vision_tower(normalise(frames_BHWC), output_hidden_states=True)
        features_BPD = out.hidden_states[model.config.vision_feature_layer]
    return features_BPD, inner.apply_pooling(inner.multi_modal_projector(features_BPD))


def join_frames(model: Any, tokens_BNE: Tensor, clips: int) -> Tensor:
    """Tokens of the frames of so many clips in a row, closed by the newline token: [B, V, E]."""
    newline = model.model.image_newline.to(tokens_BNE.dtype).expand(clips, 1, -1)
    return torch.cat([tokens_BNE.reshape(clips, -1, tokens_BNE.shape[-1]), newline], dim=1)


def packed_hidden(model: Any, visual_BVD: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Last hidden states of a packed batch: [B, L, D].

    Args:
        model: a `LlavaOnevisionForConditionalGeneration`.
        visual_BVD: its visual tokens, the closing one included.
        batch: of `pack`.
    """
    embedded_BLD = model.get_input_embeddings()(batch["ids"])
    visual_tokens = visual_BVD.shape[1]
    embedded_BLD = torch.cat(
        [
            embedded_BLD[:, :1],
            visual_BVD.to(embedded_BLD.dtype),
            embedded_BLD[:, 1 + visual_tokens :],
        ],
        dim=1,
    )
    out = model.model.language_model(
        inputs_embeds=embedded_BLD,
        attention_mask={"full_attention": packed_mask(batch["segments"])},
        position_ids=batch["positions"],
        use_cache=False,
    )
    return out.last_hidden_state
