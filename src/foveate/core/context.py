"""What a method may read at each stage: budget, layout and the signals it declared.

Legend: N visual tokens of one item or sample, S tokens of the whole sequence, H query heads,
G key heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch

from foveate.core.budget import Budget
from foveate.core.grid import Grid, Modality
from foveate.errors import MissingSignalError

#: Signals that a projector-stage method can declare in `needs`; all are float32 [1, N] maps in the
#: order of the language model's tokens (pooled, unpadded and merged exactly like the features;
#: newline tokens hold NaN) unless said otherwise.
SIGNALS: dict[str, str] = {
    "encoder.cls_attention": "attention of the [CLS] query to each patch in the block that made "
    "the features, mean over heads",
    "encoder.received_attention": "attention each patch receives in the block that made the "
    "features, mean over heads and patch queries",
    "text.embeddings": "embeddings of the text tokens of the sample, [1, S_text, D]",
    "text.tokens": "ids of the text tokens of the sample, int64 [1, S_text]",
}


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Queries and keys of one decoder layer for one sample, from which any attention is computed.

    Attributes:
        q_BHSd: rotated queries of this call, [1, H, S, d].
        k_BGTd: rotated keys, earlier turns first, [1, G, T, d] with T >= S.
        scale: softmax scale.
        visual_N: positions of the visual tokens among the S queries, int64 [N].
    """

    q_BHSd: torch.Tensor
    k_BGTd: torch.Tensor
    scale: float
    visual_N: torch.Tensor

    @property
    def num_past(self) -> int:
        """Keys that earlier calls left in the cache."""
        return self.k_BGTd.shape[-2] - self.q_BHSd.shape[-2]

    def rows(self, index_R: torch.Tensor) -> torch.Tensor:
        """Causal attention rows of the queries `index_R`, float32 [1, H, R, S].

        The columns of earlier turns are part of the softmax and are cut off afterwards. O(R T d).
        """
        from foveate import ops

        index_R = index_R.to(self.q_BHSd.device)
        rows = ops.attention_rows(
            self.q_BHSd[:, :, index_R],
            self.k_BGTd,
            scale=self.scale,
            row_positions=index_R + self.num_past,
        )
        return rows[..., self.num_past :]

    def last_row(self) -> torch.Tensor:
        """Attention of the last token, float32 [1, H, S]."""
        last = torch.tensor([self.q_BHSd.shape[-2] - 1])
        return self.rows(last)[:, :, 0]


@dataclass(eq=False)
class Context:
    """Common to all stages.

    Attributes:
        budget: the budget of this sample.
        method: registry name, for error messages.
        seed: for methods that draw random numbers; equal seeds give equal choices.
        state: the method's own scratch, alive for one forward call of one sample.
    """

    budget: Budget
    method: str = ""
    seed: int = 0
    state: MutableMapping[str, Any] = field(default_factory=dict)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator with this context's seed."""
        return torch.Generator(device).manual_seed(self.seed)


@dataclass(eq=False)
class EncoderContext(Context):
    """Inside a vision encoder, all images of the call as one batch.

    Attributes:
        layer: index of the block, 0-based.
        num_layers: blocks that run.
        num_prefix: [CLS] and register tokens at the front of the sequence.
        keys_BHNd: keys of this block's attention.
        queries_BHNd: queries of this block's attention.
    """

    layer: int = 0
    num_layers: int = 1
    num_prefix: int = 0
    keys_BHNd: torch.Tensor | None = None
    queries_BHNd: torch.Tensor | None = None


@dataclass(eq=False)
class ProjectorContext(Context):
    """Between encoder and language model, one image or video at a time.

    Attributes:
        grid: layout of the item's tokens.
        read: gives a declared signal or None; use `signal`.
    """

    grid: Grid = field(default_factory=lambda: Grid.image(1, 1))
    read: Callable[[str], torch.Tensor | None] = lambda name: None

    def signal(self, *names: str) -> torch.Tensor:
        """The first of the named signals that this model offers.

        Raises:
            MissingSignalError: the model offers none of them.
            ValueError: there is no signal of that name.
        """
        for name in names:
            value = self.read(_known(name))
            if value is not None:
                return value
        raise MissingSignalError(self.method, names)

    def has(self, name: str) -> bool:
        """Whether the model offers the signal.

        Raises:
            ValueError: there is no signal of that name.
        """
        return self.read(_known(name)) is not None


@dataclass(eq=False)
class DecoderContext(Context):
    """Before a decoder layer of the language model, one sample at a time.

    Attributes:
        layer: the layer about to run, 0-based.
        num_layers: decoder layers.
        num_visual: visual tokens of the sample when they entered the language model.
        num_text: other tokens of the sample in this call.
        modalities: what the visual tokens come from ("image", "video"); empty when unknown.
        visual_N: positions of the surviving visual tokens in the sample's sequence, int64 [N].
        attention: `attention(layer)` gives the `AttentionView` of an earlier declared layer over
            the tokens that layer saw; `survivors` maps it to the current tokens.
        survivors: `survivors(layer)` gives the positions that the current sequence's tokens had in
            that layer, int64 [S]; -1 for tokens it did not see.
    """

    layer: int = 0
    num_layers: int = 1
    num_visual: int = 0
    num_text: int = 0
    modalities: frozenset[Modality] = frozenset()
    visual_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    attention: Callable[[int], AttentionView] = lambda layer: _no_attention(layer)
    survivors: Callable[[int], torch.Tensor] = lambda layer: torch.empty(0, dtype=torch.long)

    def last_token_attention(self, layer: int) -> torch.Tensor:
        """Attention of the last token of a declared layer to the present visual tokens.

        Returns:
            float32 [N], mean over heads.
        """
        row_S = self.attention(layer).last_row()[0].mean(0)
        return row_S[self.survivors(layer)[self.visual_N]]


@dataclass(eq=False)
class CacheContext(Context):
    """After a decoder layer's attention, one sample's visual keys and values at a time.

    Attributes:
        layer: the layer whose cache is reduced.
        num_layers: decoder layers.
        position_N3: (time, row, column) of each visual token, [N, 3].
        item_N: which visual item of the sample each token belongs to, int64 [N].
    """

    layer: int = 0
    num_layers: int = 1
    position_N3: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3))
    item_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


def _no_attention(layer: int) -> AttentionView:
    raise ValueError(
        f"The attention of layer {layer} was not declared; return it from attention_layers()."
    )


def _known(signal: str) -> str:
    if signal not in SIGNALS:
        raise ValueError(f"Unknown signal {signal!r}; known: {', '.join(SIGNALS)}.")
    return signal
