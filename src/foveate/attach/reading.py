"""What a projector-stage method reads of an item beside its tokens: encoder blocks and text.

Legend: B batch, L padded length, S text tokens of a sample, N tokens of an item, I images of it or
items of a sample, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from foveate.attach.pairing import Pairing
from foveate.attach.sequence import VisualItem
from foveate.core import EncoderAttentionView, Method, Reduction
from foveate.errors import AttachmentError
from foveate.models.companion import Companion


def encoder_layers(item: VisualItem, method: Method) -> tuple[int, ...]:
    """The encoder blocks that a method reads of an item."""
    if item.encoder is None:
        return ()
    return tuple(method.encoder_layers(item.encoder.num_layers, item.encoder.feature_layer))


def encoder_reader(
    item: VisualItem, method: Method, composed: Reduction | None, device: torch.device
) -> Callable[[int], EncoderAttentionView | None]:
    """Gives the views of an item's encoder blocks; their maps follow earlier reductions."""

    def read(layer: int) -> EncoderAttentionView | None:
        view = None if item.encoder is None else item.encoder.view(layer)
        if view is None:
            return None
        token_map = view.token_map

        def to_present(map_IN: torch.Tensor) -> torch.Tensor:
            value_1N = map_IN.reshape(1, -1) if token_map is None else token_map(map_IN)
            value_1N = value_1N.to(device)
            return value_1N if composed is None else composed.gather(value_1N, float("nan"))

        return replace(view, token_map=to_present, method=method.name)

    return read


def segment_rows(item: VisualItem, items: list[VisualItem], text_S: torch.Tensor) -> torch.Tensor:
    """Rows of the text between an item and the next one.

    Where nothing stands between them, the next text there is; behind the last text, the one before.
    """
    starts_I = torch.stack([other.rows_N[0] for other in items])
    ends_I = torch.stack([other.rows_N[-1] for other in items])
    later_S = text_S[text_S > item.rows_N[-1]]
    if later_S.shape[0]:
        stop = starts_I[starts_I > later_S[0]]
        return later_S[later_S < stop.min()] if stop.shape[0] else later_S
    earlier_S = text_S[text_S < item.rows_N[0]]
    if earlier_S.shape[0]:
        stop = ends_I[ends_I < earlier_S[-1]]
        return earlier_S[earlier_S > stop.max()] if stop.shape[0] else earlier_S
    return text_S


def vocabulary_of(model: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """The head that turns hidden states [..., D] into logits of words; None: the model has none.

    The embeddings stand in for a head that a model without language modelling lacks.
    """
    found: Any = model
    head = found.get_output_embeddings()
    if head is not None:
        return head
    embeddings = found.get_input_embeddings()
    weight = getattr(embeddings, "weight", None)
    return None if weight is None else lambda x: x.to(weight.dtype) @ weight.T


def rows_per_sample(
    named: int | None, repeats: int, batch: int, text_ids: torch.Tensor | None
) -> int:
    """How many rows of a batch each sample of a per-sample budget has.

    Args:
        named: samples that the budget names; None: it is one for all.
        repeats: rows per sample as the visual items tell.
        batch: rows.
        text_ids: ids of the prompt, [batch, L], if the call has any.

    Raises:
        AttachmentError: the batch holds another number of samples.
    """
    if named is None or named * repeats == batch:
        return repeats
    rows, rest = divmod(batch, named)
    # Generation may expand pixels along with the prompts, so equal rows are all that tells.
    ids = text_ids
    if rest or ids is None or (ids != ids[::rows].repeat_interleave(rows, 0)).any():
        raise AttachmentError(
            f"The budget names {named} samples, the batch has {batch // repeats}."
        )
    return rows


def text_reader(
    item: VisualItem,
    items: list[VisualItem],
    text_S: torch.Tensor,
    embeds_BLD: torch.Tensor,
    ids_BL: torch.Tensor | None,
    companion: Companion | None,
    known: dict[Hashable, Any],
) -> Callable[[str], torch.Tensor | None]:
    """Gives the signals that come from the text of an item's sample, [1, ...], or None.

    Args:
        item: the item.
        items: all of its sample.
        text_S: rows of the sample's text in the prompt.
        embeds_BLD: the prompt's embeddings.
        ids_BL: its ids, if the call has any.
        companion: scores text against pictures.
        known: what the companion has made in this call.
    """
    sample = item.sample
    # The text behind the last visual token, or all there is.
    later_S = text_S[text_S > max(int(other.rows_N[-1]) for other in items)]
    later_S = later_S if len(later_S) else text_S
    pairing = Pairing(
        item.grid,
        embeds_BLD[sample : sample + 1, item.rows_N],
        embeds_BLD[sample : sample + 1, later_S],
        None if ids_BL is None else ids_BL[sample, later_S],
        item.report.pixels,
        companion,
        known,
    )

    def read(name: str) -> torch.Tensor | None:
        if name == "text.embeddings":
            return embeds_BLD[sample : sample + 1, text_S]
        if name == "text.segment":
            return embeds_BLD[sample : sample + 1, segment_rows(item, items, text_S)]
        if name == "text.tokens":
            return None if ids_BL is None else ids_BL[sample : sample + 1, text_S]
        return pairing.read(name)

    return read
