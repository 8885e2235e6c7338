"""Every cost figure that papers print for a registered method follows from our formulas."""

from __future__ import annotations

import pytest

from foveate.core import get_method, list_methods

from .published_figures import FIGURES, NOT_REPRODUCED, PAGE, block, tables


@pytest.mark.parametrize("figure", FIGURES, ids=lambda f: f"{f.method}: {f.what}")
def test_figure(figure):
    assert figure.holds(), f"{figure.printed} {figure.unit} printed, {figure.ours():.5g} ours"


def test_tolerances_are_stated_and_small():
    assert all(figure.within is None or figure.within <= 0.02 for figure in FIGURES)


def test_every_method_with_a_paper_is_spoken_of():
    """Its figures are reproduced, or there is a reason why not."""
    spoken = {figure.method for figure in FIGURES} | {name for name, _, _ in NOT_REPRODUCED}
    published = {name for name in list_methods() if get_method(name).card.kind != "baseline"}
    assert published <= spoken
    assert all(len(why) > 10 for _, _, why in NOT_REPRODUCED)


def test_the_page_shows_these_figures():
    assert block(PAGE.read_text("utf-8")) == tables()
