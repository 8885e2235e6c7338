"""What methods read at each stage."""

from __future__ import annotations

import math

import pytest
import torch

from foveate.core import (
    SIGNALS,
    AttentionView,
    Budget,
    CacheContext,
    Context,
    DecoderContext,
    EncoderContext,
    ProjectorContext,
)
from foveate.errors import MissingSignalError


class TestAttentionView:
    def view(self, past: int) -> tuple[AttentionView, torch.Tensor]:
        """A view of 5 new tokens, 4 query heads on 2 key heads, and its full causal attention."""
        g = torch.Generator().manual_seed(past)
        q = torch.randn(1, 4, 5, 8, generator=g)
        k = torch.randn(1, 2, past + 5, 8, generator=g)
        logits = 0.3 * q @ k.repeat_interleave(2, dim=1).transpose(2, 3)
        future = torch.arange(past + 5)[None] > torch.arange(5)[:, None] + past
        full = logits.masked_fill(future, -math.inf).softmax(dim=-1)
        return AttentionView(q, k, 0.3, torch.tensor([1, 2])), full[..., past:]

    @pytest.mark.parametrize("past", [0, 3])
    def test_rows(self, past: int) -> None:
        view, full = self.view(past)
        assert view.num_past == past
        torch.testing.assert_close(view.rows(torch.tensor([4, 1])), full[:, :, [4, 1]])
        torch.testing.assert_close(view.last_row(), full[:, :, -1])

    def test_earlier_turns_take_their_share(self) -> None:
        alone, later = self.view(0)[0].last_row().sum(-1), self.view(3)[0].last_row().sum(-1)
        torch.testing.assert_close(alone, torch.ones(1, 4))
        assert bool((later < 0.99).all())


class TestSignals:
    def test_the_first_signal_that_there_is(self) -> None:
        have = {"encoder.received_attention": torch.ones(1, 4)}
        context = ProjectorContext(Budget(0.5), method="thin", read=have.get)
        both = ("encoder.cls_attention", "encoder.received_attention")
        assert torch.equal(context.signal(*both), torch.ones(1, 4))
        assert context.has(both[1]) and not context.has(both[0])

    def test_none_of_them(self) -> None:
        context = ProjectorContext(Budget(0.5), method="thin")
        with pytest.raises(MissingSignalError, match=r"thin needs the signal text.tokens or text"):
            context.signal("text.tokens", "text.embeddings")

    @pytest.mark.parametrize("ask", ["signal", "has"])
    def test_misspelt_names(self, ask: str) -> None:
        context = ProjectorContext(Budget(0.5), read=lambda name: torch.ones(1))
        with pytest.raises(
            ValueError, match=r"Unknown signal 'encoder\.cls'; known: encoder\.cls_"
        ):
            getattr(context, ask)("encoder.cls")

    def test_every_signal_is_explained(self) -> None:
        assert all(text and not text.endswith(".") for text in SIGNALS.values())


def test_generators_start_from_the_seed() -> None:
    def draw(seed: int) -> list[float]:
        return torch.rand(4, generator=Context(Budget(), seed=seed).generator()).tolist()

    assert draw(1) == draw(1) != draw(2)


def test_undeclared_attention_is_refused() -> None:
    with pytest.raises(ValueError, match=r"layer 3 was not declared.*attention_layers"):
        DecoderContext(Budget()).attention(3)


@pytest.mark.parametrize("kind", [EncoderContext, ProjectorContext, DecoderContext, CacheContext])
def test_contexts_can_be_made_for_a_test_of_a_method(kind: type[Context]) -> None:
    one, two = kind(Budget(0.5)), kind(Budget(0.5))
    one.state["seen"] = 1
    assert two.state == {} and two.seed == 0 and one.budget == Budget(0.5)
