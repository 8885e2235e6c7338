"""Methods made for tests: they read every kind of evidence and check it against another kind."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from oracle_methods import EveryOther, kept

from foveate.core import Card, Method, Reduction

CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def _card(name: str, *stages: str) -> Card:
    return Card(name, name, "test", stages, "baseline", "For tests.", positions="original")


@dataclass(frozen=True)
class LooksAhead(EveryOther):
    """Drops before `layers`, then foretells every layer's attention and checks it afterwards."""

    card = _card("looks_ahead", "decoder")
    seen: list[Any] = field(default_factory=list, compare=False)
    tolerance: float = 2e-5

    def decoder_layers(self, num_layers):
        return tuple(range(num_layers))

    def attention_layers(self, num_layers):
        return tuple(range(num_layers - 1))

    def decoder(self, tokens, context):
        if context.layer in context.state:
            self.compare(context, *context.state.pop(context.layer))
        if context.layer + 1 == context.num_layers:
            return None
        reduction = super().decoder(tokens, context) if context.layer in self.layers else None
        if reduction is None:
            view = context.attention_ahead()
            num = context.num_tokens
            some = torch.tensor([0, num // 2, num - 1])
            rows = view.rows(some)
            last = torch.arange(num - 3, num)
            torch.testing.assert_close(
                view.mean_of_last(3)[0], view.rows(last)[0].mean((0, 1)), **CLOSE
            )
            assert view.q_BHSd.shape[2] == num == view.num_queries
            context.state[context.layer + 1] = (some, rows, view.num_past)
        return reduction

    def compare(self, context, some, ahead, num_past):
        view = context.attention(context.layer - 1)
        found = view.rows(some)
        assert view.num_past == num_past
        torch.testing.assert_close(ahead, found, atol=self.tolerance, rtol=0)
        self.seen.append((context.layer, num_past))


@dataclass(frozen=True)
class LooksAheadAndRenumbers(LooksAhead):
    card = _card("looks_ahead_and_renumbers", "decoder")
    renumbers = True


@dataclass(frozen=True)
class Observes(EveryOther):
    """Notes the length of what goes into and out of every module; keeps what it is told later."""

    card = _card("observes", "decoder")
    layers: tuple[int, ...] = (1, 3)
    seen: list[Any] = field(default_factory=list, compare=False)

    def observe_layers(self, num_layers):
        return (0, 2)

    def observe(self, input_1SD, output_1SD, context):
        lengths = [x_1SD[0].float().norm(dim=-1) for x_1SD in (input_1SD, output_1SD)]
        assert len(context.visual_N) <= context.num_visual
        return torch.stack(lengths, dim=-1)

    def decoder(self, tokens, context):
        if context.layer == 3:
            noted = [context.observed(a, m) for a in (0, 2) for m in ("attention", "mlp")]
            self.seen.append((context.id_S, torch.stack(noted)))
        return super().decoder(tokens, context)


@dataclass(frozen=True)
class Carries(Method):
    """Keeps every other token of an item and tells the decoder which ones they were."""

    card = _card("carries", "projector", "decoder")
    needs = ("text.segment",)
    seen: list[Any] = field(default_factory=list, compare=False)

    def projector(self, tokens, context):
        N = tokens.num_tokens
        context.carry("place", torch.arange(N))
        context.carry("features", tokens.x_BND[0])
        self.seen.append(("segment", context.signal("text.segment").clone()))
        return Reduction.select(kept(N), N)

    def decoder_layers(self, num_layers):
        return (0, 2)

    def decoder(self, tokens, context):
        place_N = context.carried("place")
        if context.layer == 0:
            assert torch.equal(context.carried("features"), tokens.x_BND[0])
        self.seen.append((context.layer, context.item_N, place_N))
        return Reduction.select(kept(tokens.num_tokens, 3), tokens.num_tokens)


@dataclass(frozen=True)
class ReadsValues(EveryOther):
    """Keeps the values of layer 1, and the layout of the prompt, for the test to look at."""

    card = _card("reads_values", "decoder")
    reads_values = True
    seen: list[Any] = field(default_factory=list, compare=False)

    def attention_layers(self, num_layers):
        return (1,)

    def decoder(self, tokens, context):
        self.seen.append((context, context.attention(1).v_BGTd, context.hidden()))
        return super().decoder(tokens, context)
