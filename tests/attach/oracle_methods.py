"""Methods made for tests: they act at one place, on every sample, in a way that is easy to redo."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from foveate.core import Card, Method, Reduction


def _card(name: str, stage: str) -> Card:
    return Card(name, name, "test", (stage,), "baseline", "For tests.", positions="original")


def kept(num: int, step: int = 2) -> torch.Tensor:
    """Tokens 1, 3, 5, ...: the first one always goes, so that off-by-one errors show."""
    return torch.arange(1, num, step)


@dataclass(frozen=True)
class EveryOther(Method):
    """Keeps tokens 1, 3, 5, ... before the given decoder layers."""

    card = _card("every_other", "decoder")
    layers: tuple[int, ...] = (2,)
    merge: bool = False

    def decoder_layers(self, num_layers):
        return self.layers

    def decoder(self, tokens, context):
        keep = kept(tokens.num_tokens)
        if not self.merge:
            return Reduction.select(keep, tokens.num_tokens)
        target = torch.arange(tokens.num_tokens) // 2
        target = target.clamp(max=len(keep) - 1)
        return Reduction.merge(target, len(keep), anchor_BM=keep)


@dataclass(frozen=True)
class EveryOtherAtEntry(Method):
    """Keeps tokens 1, 3, 5, ... of every item at the projector."""

    card = _card("every_other_at_entry", "projector")

    def projector(self, tokens, context):
        return Reduction.select(kept(tokens.num_tokens), tokens.num_tokens)


@dataclass(frozen=True)
class EveryOtherSlot(Method):
    """Keeps cache slots 1, 3, 5, ... of the visual tokens of every second layer."""

    card = _card("every_other_slot", "cache")

    def cache(self, keys_BGNd, values_BGNd, context):
        if context.layer % 2:
            return None
        return Reduction.select(kept(keys_BGNd.shape[2]), keys_BGNd.shape[2])


@dataclass(frozen=True)
class DropAll(Method):
    """Removes every visual token before one layer."""

    card = _card("drop_all", "decoder")
    layer: int = 2

    def decoder_layers(self, num_layers):
        return (self.layer,)

    def decoder(self, tokens, context):
        return Reduction.select(torch.empty(0, dtype=torch.long), tokens.num_tokens)


@dataclass(frozen=True)
class KeepAll(Method):
    """Declares every stage of the language model and drops nothing: the machinery alone."""

    card = Card("keep_all", "keep_all", "test", ("projector", "decoder", "cache"), "baseline", ".")

    def decoder_layers(self, num_layers):
        return tuple(range(num_layers))

    def attention_layers(self, num_layers):
        return tuple(range(num_layers))

    def projector(self, tokens, context):
        return None

    def decoder(self, tokens, context):
        if context.layer:
            row = context.attention(context.layer - 1).last_row()
            assert torch.allclose(row.sum(-1), torch.ones_like(row.sum(-1)), atol=1e-4)
        return None

    def cache(self, keys_BGNd, values_BGNd, context):
        return None


@dataclass(frozen=True)
class Parks(EveryOther):
    """Takes tokens 0, 2, 4, ... out before `layers` and brings them back before `back`."""

    card = _card("parks", "decoder")
    back: int = 3

    def return_layers(self, num_layers):
        return (self.back,)


@dataclass(frozen=True)
class Renumbers(EveryOther):
    """Like `EveryOther`, and numbers the rest contiguously from that layer on."""

    card = _card("renumbers", "decoder")
    renumbers = True
