"""Named recipes: they stand where recipes can, and clash with no method."""

from __future__ import annotations

import pytest

from foveate.core import METHODS, PRESETS, Budget, Recipe, register_method
from foveate.core.card import check_name


@pytest.mark.parametrize("name", PRESETS)
class TestEveryPreset:
    def test_it_has_a_name_of_its_own(self, name: str) -> None:
        check_name(name)
        assert name not in METHODS
        with pytest.raises(ValueError, match="is the name of a recipe"):
            register_method(name, "somewhere:Else")

    @pytest.mark.parametrize("retain", [0.02, 0.05, 0.5, 1.0])
    def test_it_takes_every_budget(self, name: str, retain: float) -> None:
        assert len(PRESETS[name].recipe.budgets(Budget(retain=retain))) == len(
            PRESETS[name].recipe.steps
        )

    def test_the_name_is_the_recipe(self, name: str) -> None:
        recipe = PRESETS[name].recipe
        assert Recipe.parse(f" {name} ") == Recipe.of(name) == recipe
        assert Recipe.from_json(Recipe.of(name).to_json()) == recipe
        assert recipe.positions == PRESETS[name].positions


def test_a_name_among_others() -> None:
    recipe = Recipe.parse("two_step + vista_llama")
    names = [step.method.name for step in recipe]
    assert names == ["vidcom2", "lvlm_csp", "vista_llama"] and recipe.positions == "original"
    assert Recipe.of(["lean", "vista_llama"]).steps[-1].method.name == "vista_llama"
    assert recipe.stages == ("projector", "decoder")


def test_fast_has_a_budget_of_its_own_until_the_call_gives_one() -> None:
    recipe = Recipe.parse("fast")
    assert [step.method.name for step in recipe] == ["centerclip"]
    assert recipe.budgets(Budget()) == (Budget(retain=0.12),)
    assert recipe.budgets(Budget(retain=0.4)) == (Budget(retain=0.4),)
    assert recipe.budgets(Budget(retain=1.0))[0].is_full
    # Behind the encoder others take the call's budget, and it keeps its own.
    longer = Recipe.parse("fast + divprune")
    assert longer.budgets(Budget(retain=0.2)) == (Budget(retain=0.12), Budget(retain=0.2))
    assert Recipe.parse("centerclip").budgets(Budget()) != recipe.budgets(Budget())
