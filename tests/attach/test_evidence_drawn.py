"""What methods note: on every item's own tokens, whatever became of them, and without effect.

Legend: N tokens of an item, P patches of an image.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from attach_suite import attach, batch_of, logits_of, model_of, one_of
from method_table import METHOD_TABLE

import foveate
from foveate.core import Budget, Card, Method, Recipe, Reduction, Step

#: Methods whose papers have nothing to show: they draw lots, count, or only change attention,
#: positions or storage.
WITHOUT = {"intp", "random", "uniform", "vista_llama"}


def _card(name: str, *stages: str) -> Card:
    return Card(name, name, "A test", stages, "baseline", "Notes what it sees.")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", [name for name, row in METHOD_TABLE.items() if row.families])
def test_evidence_fits_every_item_and_changes_nothing(name: str) -> None:
    families = METHOD_TABLE[name].families
    family = "llava_onevision" if "llava_onevision" in families else families[0]
    model, inputs = model_of(family), batch_of(family)
    with attach(name, model) as run:
        expected = logits_of(model, inputs)
        assert not any(item.evidence for item in run.report.items)
    with attach(name, model, evidence=True) as run:
        assert torch.equal(logits_of(model, inputs), expected)
    found = [(item, noted) for item in run.report.items for noted in item.evidence]
    assert bool(found) == (name not in WITHOUT)
    for item, noted in found:
        assert noted.method == name and noted.stage in METHOD_TABLE[name].stages
        if not noted.is_per_token:
            planes = [entry[:2] if noted.kind == "frames" else entry[:1] for entry in noted.value]
            assert all(0 <= t < len(item.grid.planes) for entry in planes for t in entry)
            continue
        assert noted.value.shape == (item.grid.num_tokens,) and noted.value.device.type == "cpu"
        assert noted.value.untyped_storage().nbytes() <= 8 * item.grid.num_tokens
        assert noted.shown.any()
        if noted.kind == "heat":
            assert noted.value[noted.shown].isfinite().all()


@dataclass(frozen=True)
class Pairs(Method):
    """Averages neighbours two by two before the language model and before layer 1.

    Notes the numbers of what it sees in the projector stage and before layers 1 and 2.
    """

    card: ClassVar[Card] = _card("pairs", "projector", "decoder")

    def decoder_layers(self, num_layers):
        return (1, 2)

    def projector(self, tokens, context):
        context.note("seen", torch.arange(tokens.num_tokens))
        return self._halved(tokens.num_tokens)

    def decoder(self, tokens, context):
        context.note("seen", torch.arange(tokens.num_tokens), "label")
        return self._halved(tokens.num_tokens) if context.layer == 1 else None

    def _halved(self, num):
        return Reduction.merge(torch.arange(num) // 2, -(-num // 2))


def by_place(run) -> dict[tuple, list[torch.Tensor]]:
    """(stage, layer) -> what was noted of the items, in order."""
    found: dict[tuple, list[torch.Tensor]] = {}
    for item in run.report.items:
        for noted in item.evidence:
            found.setdefault((item.sample, noted.stage, noted.layer), []).append(noted.value)
    return found


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl"])
def test_values_show_on_all_tokens_that_were_merged(family: str, padding: str) -> None:
    model, inputs = model_of(family), batch_of(family, padding)
    with foveate.reduce(model, Pairs(), retain=0.5, evidence=True) as run:
        logits_of(model, inputs)
    found = by_place(run)
    for sample in {item.sample for item in run.report.items}:
        sizes = [item.grid.num_tokens for item in run.report.items if item.sample == sample]
        for value, num in zip(found[sample, "projector", None], sizes, strict=True):
            assert value.tolist() == list(range(num))
        first = 0
        for number, num in enumerate(sizes):
            entered = first + torch.arange(num) // 2
            assert found[sample, "decoder", 1][number].tolist() == entered.tolist()
            # Pairs of layer 1 may reach across two items; both then show the same token.
            assert found[sample, "decoder", 2][number].tolist() == (entered // 2).tolist()
            first += -(-num // 2)


@dataclass(frozen=True)
class Parks(Method):
    """Keeps the even tokens before layer 1 and brings the others back before layer 3."""

    card: ClassVar[Card] = _card("parks", "decoder")

    def decoder_layers(self, num_layers):
        return (1, 2, 3)

    def return_layers(self, num_layers):
        return (3,)

    def decoder(self, tokens, context):
        context.note("seen", torch.arange(tokens.num_tokens))
        every_other = torch.arange(0, tokens.num_tokens, 2)
        return Reduction.select(every_other, tokens.num_tokens) if context.layer == 1 else None


def test_parked_tokens_show_nothing_until_they_are_back() -> None:
    model, inputs = model_of("llava"), one_of("llava")
    with foveate.reduce(model, Parks(), retain=0.5, evidence=True) as run:
        logits_of(model, inputs)
    (item,) = run.report.items
    whole, half, back = (noted.value for noted in item.evidence)
    N = item.grid.num_tokens
    assert whole.tolist() == back.tolist() == list(range(N))
    assert half[1::2].isnan().all() and half[::2].tolist() == list(range(-(-N // 2)))


@dataclass(frozen=True)
class InEncoder(Method):
    """Merges patches 0 and 1 of every image in block 0 and notes what it sees in blocks 0 and 1."""

    card: ClassVar[Card] = _card("in_encoder", "encoder")

    def encoder(self, tokens, context):
        if context.layer > 1:
            return None
        B, N = tokens.x_BND.shape[:2]
        prefix = context.num_prefix
        number_BN = torch.arange(N).expand(B, N) - prefix
        context.note("number", number_BN)
        context.note("half", number_BN // (N // 2 + 1), "label")
        context.note("first", number_BN == 0, "mark")
        if context.layer == 1:
            return None
        groups_N = torch.arange(N)
        groups_N[prefix + 1 :] -= 1
        return Reduction.merge(groups_N.expand(B, N), N - 1)


def test_evidence_of_the_encoder_goes_the_way_of_the_patches() -> None:
    model, inputs = model_of("llava"), one_of("llava")
    with foveate.reduce(model, InEncoder(), retain=0.5, evidence=True) as run:
        logits_of(model, inputs)
    (item,) = run.report.items
    found = {(noted.layer, noted.name): noted.value.tolist() for noted in item.evidence}
    P = item.grid.num_patches
    assert found[0, "number"] == list(range(P))
    assert found[1, "number"] == [0, *range(P - 1)]
    assert found[0, "first"] == [True] + [False] * (P - 1)
    assert found[1, "first"] == [True, True] + [False] * (P - 2)
    assert set(found[0, "half"]) == {0, 1}


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision", "smolvlm"])
def test_evidence_of_the_encoder_is_pooled_and_laid_out_as_the_features(family: str) -> None:
    model, inputs = model_of(family), batch_of(family)
    with foveate.reduce(model, InEncoder(), retain=0.5, evidence=True) as run:
        logits_of(model, inputs)
    for item in run.report.items:
        noted = {entry.name: entry for entry in item.evidence if entry.layer == 0}
        is_patch_N = torch.zeros(item.grid.num_tokens, dtype=torch.bool)
        is_patch_N[item.grid.patch_index()] = True
        heat_N, half_N = noted["number"].value, noted["half"].value
        assert heat_N.isfinite().equal(is_patch_N)
        assert (half_N >= 0).equal(is_patch_N) and set(half_N.tolist()) <= {-1, 0, 1}
        assert noted["first"].value.any()
        for first, last in _rows(item.grid.planes[0]):
            assert (heat_N[first + 1 : last].diff() > 0).all()


def _rows(plane):
    width = plane.width + plane.row_newline
    starts = range(plane.prefix, plane.prefix + width * plane.height + 1, width)
    return [(first, last - plane.row_newline) for first, last in pairwise(starts)]


def test_a_second_projector_method_notes_on_the_items_own_tokens() -> None:
    @dataclass(frozen=True)
    class Later(Pairs):
        any_tokens: ClassVar[bool] = True
        card: ClassVar[Card] = _card("later", "projector")

    at = ("projector",)
    recipe = Recipe((Step(Pairs(), at, Budget(0.5)), Step(Later(), at, Budget(0.5))))
    model, inputs = model_of("llava"), one_of("llava")
    with foveate.reduce(model, recipe, evidence=True) as run:
        logits_of(model, inputs)
    (item,) = run.report.items
    first, second = (noted.value for noted in item.evidence)
    assert first.tolist() == list(range(item.grid.num_tokens))
    assert second.tolist() == (first // 2).tolist()


def test_a_wrong_length_names_the_method() -> None:
    @dataclass(frozen=True)
    class Wrong(Pairs):
        card: ClassVar[Card] = _card("wrong", "projector", "decoder")

        def decoder(self, tokens, context):
            context.note("seen", torch.zeros(3))

    model, inputs = model_of("llava"), one_of("llava")
    with (
        foveate.reduce(model, Wrong(), retain=0.5, evidence=True),
        pytest.raises(ValueError, match=r"wrong: note\('seen'\) .* decoder stage sees.*got \(3,\)"),
    ):
        logits_of(model, inputs)
    with foveate.reduce(model, Wrong(), retain=0.5):
        logits_of(model, inputs)  # nobody draws, so nothing is read
