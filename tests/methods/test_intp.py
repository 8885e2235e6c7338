"""INTP: settings, formulas and published figures.

Legend: S tokens of one sample, P rows of position ids.
"""

from __future__ import annotations

import pytest
import torch

from foveate.core import Budget, CacheStorage, Recipe, RuleContext, get_method
from foveate.core.joint import refuse_conflicts
from foveate.core.step import Step
from foveate.errors import RecipeError
from foveate.methods.intp import INTP
from foveate.ops import interleave


def context(*rows: range, window: int = 4096) -> RuleContext:
    position_PS = torch.stack([torch.arange(row.start, row.stop) for row in rows])
    return RuleContext(Budget(), position_PS=position_PS, window=window)


def test_it_changes_and_stores_and_reduces_nothing():
    assert INTP.stages() == ("decoder", "cache") and INTP.reducing_stages() == ()
    assert not Step(INTP(), ("cache",)).reduces
    with pytest.raises(RecipeError, match="reduces nothing"):
        Recipe.parse("intp").budgets(Budget(retain=0.5))
    own, other = Recipe.parse("divprune + intp").budgets(Budget(retain=0.3))
    assert own == Budget(retain=0.3) and not other.is_full
    assert all(b.is_full for b in Recipe.parse("divprune + intp").budgets(Budget(retain=1.0)))


@pytest.mark.parametrize(
    ("length", "window", "answer", "expected"),
    [(8064, None, 128, 2.0), (3968, None, 128, 1.0), (10, None, 128, 1.0), (96, 64, 0, 1.5)],
)
def test_the_scale_is_the_length_over_the_window(length, window, answer, expected):
    method = INTP(window=window, answer=answer)
    assert method.rotary_scale(context(range(length))) == expected


def test_the_largest_position_of_any_axis_counts():
    method = INTP(window=8, answer=0)
    assert method.rotary_scale(context(range(4), range(12, 16), range(4))) == 2.0
    # With four rows the first counts tokens, and no rotation reads it.
    assert method.rotary_scale(context(range(100, 104), range(4), range(4), range(4))) == 1.0


def test_positions_stay_inside_the_stretched_window():
    """The slowest pair turns no further than at the end of the window it was trained on."""
    for length in (4000, 4097, 8192, 20000):
        method = INTP()
        scale = method.rotary_scale(context(range(length)))
        assert (length + method.answer - 1) / scale < 4096


@pytest.mark.parametrize(
    ("frames", "full", "stored"), [(8, 1.1, 0.1), (16, 2.1, 0.3), (32, 4.3, 0.5), (64, 8.6, 1.1)]
)
def test_published_cache_sizes(frames, full, stored):
    """Vicuna-7B: 32 layers, 4096 channels, keys and values, 256 tokens per frame; codes alone.

    The paper prints the last two rows, the others follow from the same formula.
    """
    numbers = frames * 256 * 32 * 4096 * 2
    assert round(numbers * 2 / 1e9, 1) == full
    assert round(numbers * 2 / 8 / 1e9, 1) == stored
    assert frames * 256 == {8: 2048, 16: 4096, 32: 8192, 64: 16384}[frames]
    # Ours has a byte each for the step and the zero point of 64 numbers.
    assert numbers / 4 * (1 + 2 / 16) <= numbers * 2 / 7


@pytest.mark.parametrize(("frames", "parts"), [(8, 1), (16, 2), (32, 4), (64, 8)])
def test_published_subsequences(frames, parts):
    assert interleave(frames, 8)[0].shape == (parts, 8)


def test_the_card_says_the_same():
    settings = get_method("intp").card.defaults[
        "Video-LLaVA-7B, window of 8 frames, 4096 positions"
    ]
    for name, text in settings.items():
        frames = int(name.split()[0])
        assert text == f"{frames // 8} subsequences, {frames * 256} visual tokens"


def test_storage_can_be_switched_off():
    assert INTP().cache_storage() == CacheStorage(2, 64, 128)
    assert INTP(kv_bits=4, group=32, recent=0).cache_storage() == CacheStorage(4, 32, 0)
    assert INTP(kv_bits=None).cache_storage() is None
    assert Recipe.of("intp(kv_bits=None)").steps[0].method.arguments() == {"kv_bits": None}


@pytest.mark.parametrize(
    "wrong", [{"window": 0}, {"answer": -1}, {"kv_bits": 3}, {"group": 0}, {"recent": -1}]
)
def test_bad_settings_are_refused(wrong):
    with pytest.raises(ValueError, match=r"at least|2 or 4 bits"):
        INTP(**wrong)


def test_pairs():
    for text in ("divprune + intp", "fastv + intp", "video_xl2 + intp", "safewatch + intp"):
        refuse_conflicts(Recipe.parse(text).steps)
    with pytest.raises(RecipeError, match="both stretch"):
        refuse_conflicts(Recipe.parse("intp@decoder + intp@decoder").steps)
    with pytest.raises(RecipeError, match="both say how the cache is stored"):
        refuse_conflicts(Recipe.parse("intp@cache + intp@cache").steps)
    refuse_conflicts(Recipe.parse("intp@decoder + intp(kv_bits=4)@cache").steps)
