"""Recipes: reading, writing, budgets."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import foveate
from foveate.core import Budget, Card, Grid, Method, Recipe, Step, get_method, registry
from foveate.errors import RecipeError, UnknownMethodError

HoliTom, ToMe, FastV, AIM = (get_method(n) for n in ("holitom", "tome", "fastv", "aim"))

budgets = st.none() | st.builds(Budget, retain=st.sampled_from([0.1, 1 / 3, 1.0, (0.5, 0.25)])) | (
    st.builds(Budget, tokens=st.sampled_from([7, (8, 9)])) | st.just(Budget())
)  # fmt: skip


@st.composite
def steps(draw: st.DrawFn) -> Step:
    method = draw(
        st.sampled_from([
            HoliTom(), HoliTom(tau=0.65, newline="grid"), ToMe(r=8), ToMe(r=(8, -1.0)), FastV(),
            ToMe(r=(3, 2, 1), prop_attn=False), AIM(schedule=(1.0, 0.5)),
        ])
    )  # fmt: skip
    stages = method.stages()
    count = draw(st.integers(1, len(stages)))
    return Step(method, stages[:count], draw(budgets))


recipes = st.builds(
    Recipe,
    st.lists(steps(), min_size=1, max_size=3).map(tuple),
    st.sampled_from(["auto", "compact", "original"]),
)


class TestWriting:
    @given(recipes)
    def test_json_round_trip(self, recipe: Recipe) -> None:
        again = Recipe.from_json(recipe.to_json())
        assert again == recipe and hash(again) == hash(recipe)
        assert json.loads(recipe.to_json())["foveate"] == foveate.__version__

    @given(recipes)
    def test_text_round_trip(self, recipe: Recipe) -> None:
        assert Recipe.parse(str(recipe)).steps == recipe.steps

    def test_files(self, tmp_path: Path) -> None:
        recipe, path = Recipe.parse("tome(r=8)@encoder + holitom"), tmp_path / "r.json"
        recipe.save(path)
        recipe.save(str(path))
        assert [p.name for p in tmp_path.iterdir()] == ["r.json"], "no temporary file is left"
        assert Recipe.load(path) == Recipe.load(str(path)) == recipe
        assert Recipe.of(path) == Recipe.of(str(path)) == recipe
        with pytest.raises(ValueError, match=r"folder .*missing does not exist"):
            recipe.save(tmp_path / "missing" / "r.json")
        with pytest.raises(ValueError, match="it is a folder"):
            recipe.save(tmp_path)

    def test_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        with pytest.raises(RecipeError, match=r"Cannot read the recipe .*none.json: No such file"):
            Recipe.of(tmp_path / "none.json")
        binary = tmp_path / "binary.json"
        binary.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(RecipeError, match="not a text file"):
            Recipe.load(binary)


class TestReading:
    def test_terms(self) -> None:
        recipe = Recipe.parse(" tome ( r=(8, -1.0), retain=0.6 )@encoder+holitom@decoder ")
        first, second = recipe
        assert first == Step(ToMe(r=(8, -1.0)), ("encoder",), Budget(retain=0.6))
        assert second == Step(HoliTom(), ("decoder",), None)
        assert Recipe.parse("holitom@decoder, projector").steps[0].stages == (
            "projector",
            "decoder",
        )
        assert Recipe.parse("divprune(tokens=64)").steps[0].budget == Budget(tokens=64)
        assert Recipe.parse("divprune()") == Recipe.parse("divprune")

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "Cannot read ''"),
            ("tome +", "Cannot read ''"),
            ("tome holitom", "Cannot read 'tome holitom'"),
            ("tome(r=8", r"Cannot read 'tome\(r=8'"),
            ("tome(8)", r"arguments \(8\) of tome"),
            ("tome(r=8, r=9)", "arguments .* of tome"),
            ("tome(**{'r': 8})", "arguments .* of tome"),
            ("tome(r=print)", "arguments .* of tome"),
            ("tome(q=8)", "unexpected keyword argument 'q'. Its arguments: r, prop_attn"),
            ("tome@decoder", "tome acts at encoder, not at decoder"),
            ("tome@heart", "Unknown stage 'heart'; stages are frames"),
            ("divprune(retain=2)", r"must lie in \(0, 1\], got 2"),
            ("divprune(retain=0.5, tokens=4)", "not both"),
            ("holitom(beta=7)", "beta must lie in"),
            ("holitom(newline='a+b)')", "newline must be one of"),
        ],
    )
    def test_malformed_texts(self, text: str, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            Recipe.parse(text)

    def test_names_are_looked_up_whatever_their_case(self) -> None:
        with pytest.raises(UnknownMethodError, match=r"'HoliTom'.* Did you mean holitom"):
            Recipe.parse("HoliTom(beta=0.5)")

    def test_of(self) -> None:
        tome, text = ToMe(r=8), "tome(r=8) + fastv"
        assert Recipe.of(tome) == Recipe.of("tome(r=8)") == Recipe.of([tome])
        assert Recipe.of(Step(tome, ("encoder",))) == Recipe.of(tome)
        assert Recipe.of(text) == Recipe.of([tome, FastV()]) == Recipe.of(["tome(r=8)", "fastv"])
        assert Recipe.of(Recipe.of(text)) == Recipe.of([Recipe.of(text)]) == Recipe.of((text,))
        assert Recipe.of("holitom", tau=0.7) == Recipe.of(HoliTom(tau=0.7))

    @pytest.mark.parametrize(
        ("thing", "message"),
        [
            (ToMe, r"ToMe is a class; write ToMe\(\)"),
            ([HoliTom], r"write HoliTom\(\)"),
            (3, "made of methods and their names, got 3"),
            ([3], "got 3"),
            (None, "got None"),
            ([], "at least one method"),
        ],
    )
    def test_what_is_no_recipe(self, thing, message: str) -> None:
        with pytest.raises(RecipeError, match=message):
            Recipe.of(thing)

    def test_positions(self) -> None:
        with pytest.raises(RecipeError, match=r"positions must be .* got 'gaps'"):
            Recipe(Recipe.of("tome").steps, "gaps")  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match="not at no stage"):
            Step(ToMe(), ())


class TestArguments:
    def test_they_go_to_every_method_that_has_them(self) -> None:
        recipe = Recipe.parse(
            "tome(retain=0.5) + holitom@decoder + tome",
        ).with_arguments(r=4, tau=0.7)
        assert [step.method for step in recipe] == [ToMe(r=4), HoliTom(tau=0.7), ToMe(r=4)]
        assert recipe.steps[0].budget == Budget(0.5) and recipe.steps[1].stages == ("decoder",)

    def test_positions_stay(self) -> None:
        recipe = Recipe(Recipe.of("tome").steps, "original").with_arguments(r=4)
        assert recipe.positions == "original"

    def test_unknown_ones(self) -> None:
        with pytest.raises(RecipeError, match=r"argument rr; they have: prop_attn, r\."):
            Recipe.of("tome", rr=4)
        with pytest.raises(RecipeError, match="they have: none"):
            Recipe.of("divprune", rr=4)


DOCUMENT = {
    "foveate": "9.9",
    "positions": "original",
    "steps": [{"method": "tome", "stages": ["encoder"], "arguments": {"r": 8}}],
}


class TestOtherVersions:
    def read(self, **change) -> Recipe:
        return Recipe.from_json(json.dumps(DOCUMENT | change))

    def test_only_the_method_is_required(self) -> None:
        assert Recipe.from_json('{"steps": [{"method": "tome"}]}') == Recipe.of("tome")
        assert self.read() == Recipe(Recipe.of("tome(r=8)").steps, "original")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"colour": 1}, "does not know colour of recipe .* written by foveate 9.9"),
            (
                {"steps": [{"method": "tome", "arguments": {"r": 8, "speed": 2}}]},
                "does not know speed of tome",
            ),
            (
                {"steps": [{"method": "tome", "arguments": {"r": 8}, "weight": 2}]},
                "does not know weight of tome",
            ),
        ],
    )
    def test_unknown_keys_are_left_out_with_a_warning(self, change: dict, message: str) -> None:
        with pytest.warns(UserWarning, match=message):
            recipe = self.read(**change)
        assert recipe.steps == Recipe.of("tome(r=8)").steps

    @pytest.mark.parametrize(
        "text",
        ["", "tome", "[]", "3", "{}", '{"steps": 3}', '{"steps": ["tome"]}', '{"steps": [{}]}',
         '{"steps": [{"method": 3}]}'],
    )  # fmt: skip
    def test_what_is_no_document(self, text: str) -> None:
        with pytest.raises(RecipeError, match="not a recipe document"):
            Recipe.from_json(text)

    def test_wrong_values(self) -> None:
        with pytest.raises(RecipeError, match="at least one method"):
            self.read(steps=[])
        with pytest.raises(RecipeError, match="arguments of tome must be an object"):
            self.read(steps=[{"method": "tome", "arguments": [8]}])
        with pytest.raises(UnknownMethodError, match=r"'tomme'.*Did you mean tome"):
            self.read(steps=[{"method": "tomme"}])
        with pytest.raises(RecipeError, match="positions must be"):
            self.read(positions="gaps")

    def test_nested_lists_become_tuples(self, monkeypatch: pytest.MonkeyPatch) -> None:
        @dataclass(frozen=True)
        class Nested(Method):
            card = Card("nested", "Nested", "p", ("projector",), "baseline", "s.")
            pairs: tuple[tuple[int, int], ...] = ()

            def projector(self, tokens, context):
                return None

        monkeypatch.setattr(registry, "_methods", registry._methods | {"nested": Nested})
        recipe = Recipe.of(Nested(pairs=((1, 2), (3, 4))))
        again = Recipe.from_json(recipe.to_json())
        assert again == recipe and hash(again) == hash(recipe)


class TestBudgets:
    def of(self, text: str, **budget) -> list:
        found = Recipe.parse(text).budgets(Budget(**budget))
        return [b.retain if b.retain is not None else b.tokens for b in found]

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("holitom", [0.36]),
            ("tome + holitom", [ToMe.card.retain, 0.36]),
            ("holitom + tome", [0.36, ToMe.card.retain]),
            ("tome(retain=0.6) + fastv", [0.6, 0.36]),
            ("quickvideo + tome", [0.36, ToMe.card.retain]),
            ("divprune + vista_llama", [0.36, 0.25]),
            ("tome", [0.36]),
            ("tome + divprune(retain=0.5)", [0.36, 0.5]),
        ],
    )
    def test_a_method_alone_takes_it_all(self, text: str, expected: list) -> None:
        assert self.of(text, retain=0.36) == expected

    @pytest.mark.parametrize(
        ("text", "expected"),
        [
            ("quickvideo + fastv", [0.6, 0.6]),
            ("tome(retain=0.7) + divprune + fastv", [0.7, 0.6, 0.6]),
            ("divprune(share=3) + fastv", [0.36**0.75, 0.36**0.25]),
            ("divprune(retain=0.6) + fastv", [0.6, 0.6]),
            ("pool(retain=0.6) + divprune", [0.6, 0.6]),
            ("divprune(retain=0.9) + fastv + quickvideo(share=3)", [0.9, 0.4**0.25, 0.4**0.75]),
        ],
    )
    def test_fractions_multiply_to_the_budget(self, text: str, expected: list) -> None:
        assert self.of(text, retain=0.36) == pytest.approx(expected)

    def test_counts_end_at_the_budget(self) -> None:
        def walk(text: str, tokens: int) -> list[int]:
            seen = [1000]
            for budget in Recipe.parse(text).budgets(Budget(tokens=tokens)):
                seen.append(budget.count(seen[-1]))
            return seen

        assert walk("divprune + fastv", 10) == [1000, 100, 10]
        assert walk("divprune(share=2) + fastv", 1) == [1000, 100 // 10, 1]
        assert walk("divprune + fastv(retain=0.5)", 10) == [1000, 20, 10]
        assert walk("divprune + fastv + quickvideo", 1) == [1000, 100, 10, 1]
        assert walk("divprune(tokens=400) + fastv", 10) == [1000, 400, 10]
        assert walk("divprune + fastv", 2000) == [1000, 1000, 1000]

    def test_the_data_decide_the_order_not_the_recipe(self) -> None:
        budgets = Recipe.parse("quickvideo + divprune").budgets(Budget(tokens=10))
        assert [b.count(n) for b, n in zip(budgets, (100, 1000), strict=True)] == [10, 100]

    def test_without_one_all_take_their_own_or_the_published(self) -> None:
        assert self.of("tome + holitom(retain=0.2)") == [ToMe.card.retain, 0.2]
        assert self.of("pool + divprune") == [0.25, get_method("divprune").card.retain]

    def test_one_switches_everything_off(self) -> None:
        assert self.of("tome(retain=0.6) + holitom", retain=1.0) == [1.0, 1.0]
        assert self.of("pool(retain=0.1) + divprune", retain=1) == [1.0, 1.0]
        assert self.of("tome(retain=0.6) + holitom", retain=(1.0, 1.0)) == [1.0, 1.0]

    def test_absolute_and_per_sample(self) -> None:
        assert self.of("tome + divprune", tokens=64) == [ToMe.card.retain, 64]
        assert self.of("tome + divprune", retain=(0.5, 0.1))[1] == (0.5, 0.1)
        assert self.of("fastv + divprune", retain=(0.25, 0.01)) == [(0.5, 0.1), (0.5, 0.1)]
        halves = self.of("fastv(retain=(0.5, 0.2)) + divprune", retain=0.1)
        assert halves == [(0.5, 0.2), (0.2, 0.5)]
        with pytest.raises(ValueError, match=r"name \[3, 2\] samples"):
            self.of("fastv(retain=(0.5, 0.2)) + divprune", retain=(0.1, 0.1, 0.1))

    def test_a_budget_that_the_recipe_cannot_keep(self) -> None:
        with pytest.raises(RecipeError, match="has a budget of its own; drop retain/tokens"):
            self.of("divprune(retain=0.5)", retain=0.5)
        with pytest.raises(RecipeError, match=r"leaves too little: the recipe cannot keep 0.6"):
            self.of("divprune(retain=0.5) + fastv", retain=0.6)
        with pytest.raises(RecipeError, match="is an absolute count"):
            self.of("divprune(tokens=64) + fastv", retain=0.5)
        with pytest.raises(RecipeError, match="reduces nothing"):
            self.of("vista_llama", retain=0.5)
        assert self.of("divprune(retain=0.5) + fastv", retain=0.5) == [0.5, 1.0]

    @pytest.mark.parametrize("share", ["0", "-1", "'2'", "True", "2, retain=0.5"])
    def test_a_share_that_is_none(self, share: str) -> None:
        with pytest.raises(RecipeError, match="share"):
            Recipe.parse(f"divprune(share={share})")

    def test_shares_are_written_down(self) -> None:
        recipe = Recipe.parse("divprune(share=2) + fastv")
        assert str(recipe) == "divprune(share=2) + fastv"
        assert Recipe.from_json(recipe.to_json()) == recipe
        assert recipe.with_arguments(layer=3).steps[0].share == 2

    def test_a_default_holds_until_the_call_says_otherwise(self) -> None:
        text = "tome(default=0.4) + fastv(layer=3, default=0.8)"
        recipe = Recipe.parse(text)
        assert recipe.budgets(Budget()) == (Budget(retain=0.4), Budget(retain=0.8))
        # Asked for, not published: a method with a rule of its own for the number keeps to it.
        assert not any(budget.published for budget in recipe.budgets(Budget()))
        assert self.of(text, retain=0.1) == [0.4, 0.1]
        assert self.of(text, tokens=64) == [0.4, 64]
        assert self.of("tome(default=0.4)", retain=0.1) == [0.1]
        assert self.of(text, retain=1.0) == [1.0, 1.0]
        assert str(recipe) == text and recipe.with_arguments(layer=2).steps[1].default == 0.8
        assert Recipe.from_json(recipe.to_json()) == recipe

    @pytest.mark.parametrize("default", ["0", "1.5", "'2'", "True", "[0.5]", "0.5, retain=0.5"])
    def test_a_default_that_is_none(self, default: str) -> None:
        with pytest.raises(RecipeError, match="default"):
            Recipe.parse(f"divprune(default={default})")

    def test_a_step_that_keeps_all_says_so(self) -> None:
        step = Step(ToMe(), ("encoder",), Budget())
        assert step.budget == Budget(retain=1.0)
        assert Recipe.from_json(Recipe((step,)).to_json()).steps == (step,)

    def test_where_a_stage_acts(self) -> None:
        recipe = Recipe.parse("tome + holitom + fastv")
        assert (recipe.at("encoder"), recipe.at("projector")) == ([0], [1])
        assert (recipe.at("decoder"), recipe.at("cache")) == ([1, 2], [])


class TestConflicts:
    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("divprune + holitom", "holitom reads the frames and rows of an item"),
            ("transprune + pyramiddrop", "both number the tokens anew"),
            ("pyramiddrop + lvlm_csp", "lvlm_csp brings tokens back"),
            ("lvlm_csp + pyramiddrop", "lvlm_csp brings tokens back"),
            ("video_xl2 + quickvideo", "quickvideo would reduce what is reduced"),
            ("quickvideo + video_xl2", "quickvideo would reduce what is reduced"),
            ("fastv + video_xl2", "changes what layers see or hold"),
            ("flowcut + hiprune", "hiprune reads the frames"),
            ("flowcut@encoder + hiprune", "would find no attention of its blocks for them"),
            ("holitom + flowcut@encoder", "no encoder.received_attention for them"),
            ("safewatch@cache + quickvideo", "safewatch chooses once for the caches"),
            ("quickvideo + safewatch@cache", "safewatch chooses once for the caches"),
        ],
    )
    def test_refused_with_the_reason(self, text: str, reason: str) -> None:
        with pytest.raises(RecipeError, match=reason):
            Recipe.parse(text).budgets(Budget(retain=0.25))

    @pytest.mark.parametrize(
        "text",
        [
            "holitom + divprune",
            "holitom@projector + pyramiddrop@decoder",
            "transprune + fastv",
            "dycoke@projector + quickvideo",
            "divprune + video_xl2",
            "todre@projector + vista_llama",
            "flowcut@encoder + divprune",
        ],
    )
    def test_what_goes_together(self, text: str) -> None:
        assert len(Recipe.parse(text).budgets(Budget(retain=0.25))) == 2


class TestCount:
    grid = Grid.video(4, 14, 14)

    def count(self, text: str, **budget) -> tuple[int, bool]:
        counted = Recipe.parse(text).count(self.grid, Budget(**budget))
        return counted.tokens, counted.exact

    def test_one_method(self) -> None:
        assert self.count("divprune", retain=0.25) == (196, True)
        assert self.count("divprune", retain=1.0) == (784, True)
        assert self.count("tome + fastv", retain=0.25) == (784, True), "neither is at the projector"
        assert self.count("holitom@decoder", retain=0.25) == (784, True)
        tokens, exact = self.count("holitom", retain=0.25)
        assert 196 <= tokens < 784 and not exact

    def test_several_give_a_bound(self) -> None:
        tokens, exact = self.count("pool(retain=0.5) + divprune", retain=0.25)
        assert 196 <= tokens <= 392 and not exact
        assert self.count("pool(retain=1.0) + divprune", retain=0.25) == (196, True)
