"""Methods that compute attention in the place of the fused kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import foveate
from foveate.attach.encoder_attention import AskingMask
from foveate.core import Card, EncoderContext, Method, Recipe
from foveate.methods import zero_tprune
from foveate.methods.zero_tprune import ZeroTPrune
from tiny import tiny_encoder

FAMILIES = ("vit", "dinov2", "clip", "siglip")


class Kernels(TorchDispatchMode):
    """Counts the fused kernels that run."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "scaled_dot_product" in str(func) and "backward" not in str(func):
            self.calls["kernel"] += 1
        return func(*args, **(kwargs or {}))


def pixels_for(encoder: torch.nn.Module, batch: int = 2) -> torch.Tensor:
    size = encoder.config.image_size
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def features(encoder: torch.nn.Module, recipe: Any, **more: Any) -> tuple[torch.Tensor, int]:
    with Kernels() as kernels, foveate.reduce(encoder, recipe, retain=0.5, **more):
        out = encoder(pixels_for(encoder)).last_hidden_state
    return out.detach(), kernels.calls["kernel"]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_kernel_does_not_run_where_the_method_attends(family: str) -> None:
    encoder = tiny_encoder(family)
    blocks = encoder.config.num_hidden_layers
    with torch.no_grad():
        mine, none = features(encoder, "gtp_vit")
    fused, all_of_them = features(encoder, "gtp_vit")  # gradients could be wanted
    assert (none, all_of_them) == (0, blocks)
    torch.testing.assert_close(mine, fused, atol=1e-5, rtol=1e-5)


def test_other_kernels_run_as_ever() -> None:
    encoder = tiny_encoder("vit")
    with torch.no_grad():
        fused, _ = features(encoder, "gtp_vit")
        encoder.set_attn_implementation("eager")
        eager, _ = features(encoder, "gtp_vit")
    torch.testing.assert_close(eager, fused, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class Watching(Method):
    """Answers as it is told, and remembers what it was asked."""

    card: ClassVar[Card] = Card(
        name="watching", title="", paper="", year=2024, stages=("encoder",),
        kind="training-free", summary="", retain=0.5,
    )  # fmt: skip
    reads_values: ClassVar[bool] = True
    give: str = "nothing"

    def encoder_attention(self, context: EncoderContext) -> torch.Tensor | None:
        asked.append(context.in_place)
        v_BHNd = context.values_BHNd
        assert v_BHNd is not None
        return {"nothing": None, "values": v_BHNd, "less": v_BHNd[:, :, 1:]}[self.give]

    def encoder(self, tokens: Any, context: EncoderContext) -> None:
        return None


asked: list[bool] = []


def test_it_is_asked_once_per_block_and_may_leave_it_to_the_kernel() -> None:
    encoder = tiny_encoder("siglip")
    blocks = encoder.config.num_hidden_layers
    with torch.no_grad():
        untouched = encoder(pixels_for(encoder)).last_hidden_state
        asked.clear()
        out, calls = features(encoder, Recipe.of(Watching()))
        assert asked == [True] * blocks and calls == blocks
        assert out.equal(untouched)
        asked.clear()
        replaced, calls = features(encoder, Recipe.of(Watching("values")))
        assert asked == [True] * blocks and calls == 0
        assert not replaced.allclose(untouched)
    asked.clear()
    behind, calls = features(encoder, Recipe.of(Watching("values")))
    assert asked == [False] * blocks and calls == blocks
    torch.testing.assert_close(behind, replaced)


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_given_has_to_fit(grad: bool) -> None:
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match="watching: encoder_atten"):
        features(tiny_encoder("vit"), Recipe.of(Watching("less")))


def test_slices_and_other_dtypes_of_the_mask_still_ask() -> None:
    mask = AskingMask.carrying(torch.zeros(1, 1, 1, 6), torch.empty(1, 6, 4), lambda: None)
    for made in (mask[..., :4], mask.double(), mask.expand(2, -1, 3, -1)):
        assert isinstance(made, AskingMask) and made.ask() is None and made.weighs
    q = torch.randn(1, 2, 6, 4)
    attend = torch.nn.functional.scaled_dot_product_attention
    assert attend(q, q, q, attn_mask=mask).equal(attend(q, q, q, attn_mask=torch.zeros(6)[None]))
    mask.ask = lambda: 2 * q
    assert attend(q, q, q, mask).equal(2 * q)


@pytest.mark.parametrize("family", ["vit", "siglip"])
def test_attention_that_is_needed_whole_is_made_once(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tiny_encoder(family)
    blocks = encoder.config.num_hidden_layers
    acting = len(set(ZeroTPrune().blocks(blocks)))
    with torch.no_grad():
        mine, left = features(encoder, "zero_tprune")
        assert left == blocks - acting
        monkeypatch.setattr(zero_tprune, "_KEPT_BYTES", 0)  # too much to wait for the block's end
        apart, all_of_them = features(encoder, "zero_tprune")
    assert all_of_them == blocks
    torch.testing.assert_close(mine, apart, atol=1e-5, rtol=1e-5)
