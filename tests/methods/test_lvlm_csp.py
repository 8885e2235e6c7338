"""LVLM_CSP: choosers, counts from formulas, parked tokens, and the needle that pruning loses."""

from __future__ import annotations

import pytest
import torch

import foveate
from foveate.core import AttentionView, Budget, Grid, Recipe, Tokens
from foveate.core.flops import published_flops
from foveate.errors import MissingSignalError
from foveate.methods.lvlm_csp import LVLMCSP, by_instance, instance_shares, strided
from foveate.models.registry import adapter_for
from tiny import IMAGE, tiny_inputs, tiny_model

from .helpers import decoder_context, item, view_of

PUBLISHED = Budget(retain=LVLMCSP.card.retain)


def first_range(method: LVLMCSP, grid: Grid, budget: Budget = PUBLISHED, **more) -> list[int]:
    """What takes part in the first layers of a model of 32."""
    N = grid.num_tokens
    view = view_of(torch.ones(N + 4), torch.arange(2, 2 + N))
    context = decoder_context(view, 0, budget, num_layers=32, **more)
    reduction = method.decoder(item(grid), context)
    assert reduction is not None
    return reduction.anchor_BM[0].tolist()


# -- how many ---------------------------------------------------------------------------------


def test_published_reduction_from_the_formula() -> None:
    """12 layers of 64 tokens, 4 of 256 and 16 of 64: 34.4 % per layer, 65 % fewer FLOPs."""
    schedule = LVLMCSP().schedule(256, 32, PUBLISHED)
    assert schedule == [64] * 12 + [256] * 4 + [64] * 16
    assert sum(schedule) / 32 == 88 and round(88 / 256, 3) == 0.344
    fewer = LVLMCSP(clusters=64, keep=48).schedule(256, 32, PUBLISHED)
    assert sum(fewer) / 32 / 256 == 0.3125
    # 4 n d^2 + 2 n^2 d + 3 n d m per layer, Vicuna-7B.
    d, m = 4096, 11008

    def flops(lengths: list[int]) -> int:
        return sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in lengths)

    ratio = flops(schedule) / flops([256] * 32)
    assert 0.33 < ratio < 0.35
    assert 0.30 < flops(fewer) / flops([256] * 32) < 0.315
    # The form that most papers print counts two of the three MLP products.
    printed = published_flops(32, d, m, schedule) / published_flops(32, d, m, 256)
    assert abs(printed - ratio) < 0.005


@pytest.mark.parametrize("num_layers", [3, 8, 28, 32, 40])
@pytest.mark.parametrize("retain", [0.05, 0.1, 0.2, 0.34375, 0.5, 0.9])
def test_mean_share_is_the_budget(num_layers: int, retain: float) -> None:
    schedule = LVLMCSP().schedule(576, num_layers, Budget(retain=retain))
    mean = sum(schedule) / num_layers / 576
    assert mean == pytest.approx(max(retain, 1 / num_layers), abs=0.004)
    assert schedule[0] == schedule[-1] < max(schedule) == 576


def test_counts_can_be_named() -> None:
    assert LVLMCSP(clusters=0.5, keep=10).counts(64, 32, PUBLISHED)[:2] == (32, 10)
    # What the first range takes, the last one has to spare.
    schedule = LVLMCSP(clusters=0.5).schedule(256, 32, PUBLISHED)
    assert schedule[0] == 128 and sum(schedule) / 32 == pytest.approx(88, abs=0.5)
    assert LVLMCSP(clusters=100).counts(64, 32, PUBLISHED)[0] == 64
    assert LVLMCSP().schedule(9, 4, Budget(retain=1.0)) == [9] * 4


def test_layers_follow_the_depth() -> None:
    assert LVLMCSP().layers(32) == (12, 16) and LVLMCSP().layers(40) == (15, 20)
    assert LVLMCSP().layers(4) == (2, 3) and LVLMCSP().layers(3) == (1, 2)
    assert LVLMCSP().return_layers(32) == (12,)
    assert LVLMCSP().decoder_layers(32) == (0, 13, 14, 15, 16)
    assert LVLMCSP().attention_layers(32) == (12, 13, 14, 15)
    with pytest.raises(ValueError, match="three ranges"):
        LVLMCSP().check(None, 2)
    with pytest.raises(ValueError, match="layers 8 and 8 of 12"):
        LVLMCSP(scatter_layer=8, prune_layer=8).check(None, 12)
    with pytest.raises(ValueError, match="prune_layer = 40"):
        LVLMCSP(prune_layer=40).check(None, 32)


# -- which ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num", "keep", "step"), [(256, 64, 4), (250, 64, 3), (7, 3, 2)])
def test_uniform_chooser_is_the_papers_stride(num: int, keep: int, step: int) -> None:
    expected = [step * i for i in range(keep)]
    assert strided(num, keep).tolist() == expected
    method = LVLMCSP(chooser="uniform", clusters=keep)
    assert first_range(method, Grid.image(1, num)) == expected


def test_even_chooser_is_the_stride_where_that_divides_and_covers_all_elsewhere() -> None:
    found = first_range(LVLMCSP(clusters=64), Grid.image(16, 16))
    assert found == strided(256, 64).tolist()
    found = first_range(LVLMCSP(clusters=140), Grid.image(10, 25))
    gaps = torch.tensor([*found, 250]).diff()
    assert len(set(found)) == 140 and set(gaps.tolist()) == {1, 2}


def test_random_chooser_repeats_with_the_seed() -> None:
    method, grid = LVLMCSP(chooser="random"), Grid.image(16, 16)
    first = first_range(method, grid, seed=1)
    assert first == first_range(method, grid, seed=1) != first_range(method, grid, seed=2)
    assert len(set(first)) == 64 and first == sorted(first)


def test_cls_chooser_takes_what_the_encoder_attends_to() -> None:
    score_N = torch.rand(49, generator=torch.Generator().manual_seed(0))
    score_N[7::8] = torch.nan  # newline tokens
    method = LVLMCSP(chooser="cls", clusters=5)
    assert method.needs == ("encoder.cls_attention",) and LVLMCSP().needs == ()
    found = first_range(method, Grid.image(7, 7), carried=lambda name: score_N)
    assert found == score_N.nan_to_num(-1).topk(5).indices.sort().values.tolist()


def test_cls_chooser_on_models() -> None:
    """The map is that of the projector stage, also behind a method that drops tokens there."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    with torch.no_grad(), foveate.reduce(model, "fastervlm", tokens=6) as run:
        model(**inputs)
    expected = run.report.items[0].reduction.anchor_BM[0]
    method = LVLMCSP(chooser="cls", clusters=6)
    with torch.no_grad(), foveate.reduce(model, method, retain=0.5) as run:
        model(**inputs)
    assert run.report.items[0].alive[0].tolist() == expected.tolist()
    recipe = "fastervlm(tokens=6) + lvlm_csp(chooser='cls', clusters=2, retain=0.6)"
    with torch.no_grad(), foveate.reduce(model, recipe) as both:
        model(**inputs)
    kept = both.report.items[0].reduction.anchor_BM[0]
    assert kept.tolist() == expected.tolist()
    with torch.no_grad(), foveate.reduce(model, "fastervlm", tokens=2) as run:
        model(**inputs)
    best = run.report.items[0].reduction.anchor_BM[0].tolist()
    assert kept[both.report.items[0].alive[0]].tolist() == best
    with pytest.raises(MissingSignalError, match="lvlm_csp needs the signal"):
        foveate.reduce(tiny_model("llava_onevision"), method, retain=0.5)


def two_masks() -> torch.Tensor:
    masks = torch.zeros(2, 80, 80, dtype=torch.bool)
    masks[0, :40, :40] = True  # a quarter of the picture
    masks[1, 66:70, 73:77] = True  # less than one of 10 x 10 tokens
    return masks


def test_seg_first_chooses_of_every_mask_by_its_size() -> None:
    grid = Grid.image(10, 10)
    method = LVLMCSP(chooser="seg_first", masks=two_masks(), clusters=16)
    found = torch.tensor(first_range(method, grid))
    row, column = found // 10, found % 10
    assert len(found.unique()) == 16
    large = (row < 5) & (column < 5)
    small = (row == 8) & (column == 9)
    assert int(large.sum()) == 4 and int(small.sum()) == 1  # floor(16 / 4), max(1, floor(0.04))
    even = first_range(LVLMCSP(clusters=16), grid)
    assert not set(even) & {89}, "evenly spaced tokens miss the small object"


def test_seg_first_trims_and_fills_to_the_count() -> None:
    assert instance_shares([50, 30, 1, 1, 1], [9, 9, 9, 9, 9], 6) == [2, 1, 1, 1, 1]
    assert sum(instance_shares([1] * 9, [1] * 9, 4)) == 4
    instance_N = torch.tensor([0, 0, 1, 1, 1, 1, 1, 1])
    for keep in range(1, 9):
        found = by_instance(instance_N, [2.0, 6.0], keep).tolist()
        assert len(set(found)) == keep and found == sorted(found)
    # Instance 0 has one token for its share of four: the background gets the rest.
    found = by_instance(torch.tensor([1, 1, 0, 1, 1, 1]), [8.0, 2.0], 5)
    assert 2 in found.tolist() and len(found) == 5


def test_seg_first_survives_a_round_trip_through_text() -> None:
    recipe = Recipe.of(LVLMCSP(chooser="seg_first", masks=two_masks()[:, ::40, ::40]))
    again = Recipe.of(str(recipe))
    assert again == recipe and hash(again) == hash(recipe)


def test_seg_first_takes_one_image() -> None:
    method = LVLMCSP(chooser="seg_first", masks=two_masks())
    with pytest.raises(ValueError, match="masks of one image"):
        first_range(method, Grid.video(2, 5, 5))
    newline = Grid.image(5, 5, row_newline=True)
    assert len(first_range(method, newline)) == round(30 * 0.25)


# -- pruning ----------------------------------------------------------------------------------


def prune(method: LVLMCSP, row_S: torch.Tensor, visual_N: torch.Tensor, layer: int = 16):
    context = decoder_context(view_of(row_S, visual_N), layer, PUBLISHED, num_layers=32)
    reduction = method.decoder(Tokens(torch.zeros(1, len(visual_N), 4)), context)
    return None if reduction is None else reduction.anchor_BM[0].tolist()


def test_pruning_keeps_the_top_of_the_query_row_in_order() -> None:
    row_S = torch.tensor([9.0, 0.1, 0.5, 0.2, 0.4, 0.3, 0.6, 0.0, 0.45, 9.0])
    visual_N = torch.arange(1, 9)
    assert prune(LVLMCSP(keep=3), row_S, visual_N) == [1, 5, 7]
    assert prune(LVLMCSP(keep=3), row_S, visual_N, layer=15) is None


def test_needle_in_no_cluster_is_found_after_scattering() -> None:
    """Scattering brings it back; dropping the same tokens at the same early layer loses it."""
    grid, needle = Grid.image(16, 16), 130
    clusters = first_range(LVLMCSP(), grid)
    assert needle not in clusters
    row_S = torch.rand(256 + 8, generator=torch.Generator().manual_seed(0))
    row_S[4 + needle] = 5.0
    kept = prune(LVLMCSP(), row_S, torch.arange(4, 260))
    assert kept is not None and needle in kept and len(kept) == 64


def test_query_names_the_token_that_prunes() -> None:
    # Token 9 attends to visual token 1, token 10 to visual token 3; both keys are one-hot.
    q = torch.zeros(1, 1, 11, 2)
    q[..., 9, 0] = q[..., 10, 1] = 8.0
    k = torch.zeros(1, 1, 11, 2)
    k[..., 3, 0] = k[..., 5, 1] = 1.0
    view = AttentionView(q, k, 1.0, torch.arange(2, 8))
    for query, expected in ((-1, [3]), (-2, [1])):
        context = decoder_context(view, 16, PUBLISHED, num_layers=32)
        method = LVLMCSP(keep=1, query=query)
        reduction = method.decoder(Tokens(torch.zeros(1, 6, 4)), context)
        assert reduction is not None and reduction.anchor_BM[0].tolist() == expected
    for query in (-5, -12):
        with pytest.raises(ValueError, match="names no text token"):
            LVLMCSP(keep=1, query=query).decoder(Tokens(torch.zeros(1, 6, 4)), context)


# -- on a model -------------------------------------------------------------------------------


def states(scale: float, method: LVLMCSP) -> tuple[list[torch.Tensor], foveate.Attachment]:
    """Inputs of every layer when one parked token's embedding is scaled."""
    model, inputs = tiny_model("llava"), tiny_inputs("llava")
    adapter, seen = adapter_for(model), []
    place = (inputs["input_ids"][0] == IMAGE).nonzero()[3, 0]

    def change(module, args, kwargs):
        embeds = kwargs["inputs_embeds"].clone()
        embeds[0, place] *= scale
        return args, {**kwargs, "inputs_embeds": embeds}

    text = adapter.language_model(model)
    handles = [text.register_forward_pre_hook(change, with_kwargs=True)]
    with torch.no_grad(), foveate.reduce(model, method, retain=0.6) as run:
        for layer in adapter.layers(model):
            hook = lambda module, args, kwargs, out: seen.append(  # noqa: E731
                (args[0] if args else kwargs["hidden_states"])[0]
            )
            handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        model(**inputs)
    for handle in handles:
        handle.remove()
    return seen, run


def test_parked_tokens_rest_and_act_only_after_scattering() -> None:
    method = LVLMCSP(chooser="uniform", clusters=0.5)  # tokens 0, 2, 4, .. take part
    plain, run = states(1.0, method)
    other, _ = states(3.0, method)
    for layer in (0, 1):
        assert torch.equal(plain[layer], other[layer])
    moved = (plain[2] != other[2]).any(-1)
    assert int(moved.sum()) == 1, "it returns as it left, before the first scattering layer"
    torch.testing.assert_close(other[2][moved], 3.0 * plain[2][moved])
    assert not torch.equal(plain[3], other[3])
    N = run.report.visual_after
    text = run.report.prompt_lengths[0] - N
    expected = [text + n for n in method.schedule(N, 4, Budget(retain=0.6))]
    assert run.report.layer_lengths[0] == run.report.cache_lengths[0] == expected


@pytest.mark.parametrize("attn", ["eager", "sdpa"])
def test_keeping_all_in_every_range_is_the_untouched_model(attn: str) -> None:
    model, inputs = tiny_model("llava", attn=attn), tiny_inputs("llava")
    with torch.no_grad():
        expected = model(**inputs).logits
        with foveate.reduce(model, LVLMCSP(clusters=1.0, keep=1.0), retain=0.5):
            got = model(**inputs).logits
    torch.testing.assert_close(got, expected, atol=0 if attn == "eager" else 1e-5, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"clusters": 0}, "clusters is a number"),
        ({"keep": 1.5}, "keep is a number"),
        ({"chooser": "best"}, "chooser must be one of"),
        ({"query": 0}, "query counts back"),
        ({"chooser": "seg_first"}, "go together"),
        ({"masks": [[[1]]]}, "go together"),
        ({"chooser": "seg_first", "masks": [[1, 0]]}, "got shape"),
        ({"chooser": "seg_first", "masks": [[[1, 0], [1]]]}, "equal rows"),
    ],
)
def test_bad_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LVLMCSP(**arguments)
