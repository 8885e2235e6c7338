"""Methods, cards and the registry: what somebody meets who adds a method in one file."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint
from types import ModuleType

import pytest

from foveate.core import (
    METHODS,
    STAGES,
    Budget,
    Card,
    Count,
    Grid,
    Method,
    get_method,
    list_methods,
    register_method,
    registry,
    relative_layer,
)
from foveate.errors import UnknownMethodError


def card(name: str = "thin", *stages: str, **rest) -> Card:
    return Card(name, name.title(), "p", stages or ("projector",), "baseline", "s.", **rest)


@dataclass(frozen=True)
class Thin(Method):
    """For tests; one field has the name of a stage."""

    card = card()
    frames: int = 8
    layers: tuple[int, ...] = field(default_factory=tuple)
    derived: int = field(default=0, init=False)

    def projector(self, tokens, context):
        return None


class TestMethod:
    def test_stages_are_the_methods_it_overrides(self) -> None:
        assert Thin.stages() == ("projector",), "a field named frames is no stage"

        class Both(Thin):
            def encoder(self, tokens, context):
                return None

        assert Both.stages() == ("encoder", "projector")
        assert Method.stages() == ()

    def test_arguments(self) -> None:
        assert Thin().arguments() == {}
        assert Thin(frames=4, layers=(1,)).arguments() == {"frames": 4, "layers": (1,)}
        assert Thin(frames=8).arguments() == {}
        assert Thin().with_arguments(frames=2) == Thin(frames=2)
        for wrong in ("frame", "derived", "card"):
            with pytest.raises(ValueError, match=rf"no argument {wrong}; it has: frames, layers"):
                Thin().with_arguments(**{wrong: 1})

    def test_counting_ahead(self) -> None:
        grid = Grid.image(4, 4, newlines_at_end=1)
        assert Thin().count(grid, Budget(retain=0.5)) == Count(8, exact=True)
        assert Thin().count(grid, Budget(tokens=99)) == Count(17)

        @dataclass(frozen=True)
        class Inside(Method):
            card = card("inside", "decoder")

            def decoder(self, tokens, context):
                return None

        assert Inside().count(grid, Budget(retain=0.5)) == Count(17)

    def test_defaults_do_nothing(self) -> None:
        method = Thin()
        assert method.check(12, 24) is None and method.name == "thin"
        assert tuple(method.decoder_layers(8)) == tuple(method.attention_layers(8)) == ()
        assert method.needs == () and method.proportional_attention is False
        with pytest.raises(NotImplementedError):
            method.decoder(None, None)  # type: ignore[arg-type]


class TestRelativeLayer:
    @pytest.mark.parametrize(
        ("layer", "layers", "expected"),
        [(0, 4, 0), (3, 4, 3), (3.0, 4, 3), (0.5, 28, 14), (18 / 28, 28, 18), (0.01, 4, 0),
         (0.9, 4, 3), (0.999, 1, 0), (2.0, 28, 2)],
    )  # fmt: skip
    def test_layers(self, layer: float, layers: int, expected: int) -> None:
        assert relative_layer(layer, layers) == expected

    @pytest.mark.parametrize("layer", [4, -1, 1.5, -0.5, float("nan"), 4.0, True])
    def test_layers_that_do_not_exist(self, layer: float) -> None:
        with pytest.raises(ValueError, match=r"start = .* does not exist in a model with 4 layers"):
            relative_layer(layer, 4, "start")


class TestCard:
    @pytest.mark.parametrize("name", ["a", "tome", "fast_v", "v2", "2d_pool"])
    def test_names(self, name: str) -> None:
        assert card(name).name == name

    @pytest.mark.parametrize("name", ["", "ToMe", "fast-v", "fast v", "_x", "x_", "a__b", "été"])
    def test_names_that_no_recipe_can_hold(self, name: str) -> None:
        with pytest.raises(ValueError, match="lower case letters"):
            card(name)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stages": ("projectors",)}, "stages must be a tuple of some of frames"),
            ({"stages": ()}, "stages must be"),
            ({"stages": "encoder"}, "got 'encoder'"),
            ({"kind": "free"}, "kind must be one of training-free, trained, baseline, got 'free'"),
            ({"positions": "gaps"}, "positions must be"),
            ({"retain": 0.0}, r"retain must lie in \(0, 1\], got 0.0"),
            ({"retain": 1.1}, "got 1.1"),
        ],
    )
    def test_fields_are_checked(self, change: dict, message: str) -> None:
        fields = {"stages": ("encoder",), "kind": "baseline", "positions": "compact", "retain": 0.5}
        with pytest.raises(ValueError, match=f"thin: .*{message}"):
            Card(name="thin", title="Thin", paper="p", summary="s.", **(fields | change))


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict:
    """A registry of its own, so that tests leave nothing behind."""
    fresh = dict(registry._BUILTIN)
    monkeypatch.setattr(registry, "_methods", fresh)
    monkeypatch.setattr(registry, "_outside_loaded", True)
    return fresh


@pytest.fixture
def plug_ins(names: dict, monkeypatch: pytest.MonkeyPatch):
    """Install entry points for the first look-up of the test."""

    def install(*entries: tuple[str, str]) -> None:
        found = [EntryPoint(name, value, registry.ENTRY_POINT_GROUP) for name, value in entries]
        monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: found)
        monkeypatch.setattr(registry, "_outside_loaded", False)

    module = ModuleType("thin_package")
    module.Thin = Thin  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "thin_package", module)
    return install


class TestRegistry:
    def test_methods_are_imported_when_asked_for(self, names: dict) -> None:
        assert names["divprune"] == "foveate.methods.divprune:DivPrune"
        found = get_method("divprune")
        assert names["divprune"] is found and found.__name__ == "DivPrune"

    def test_the_view_is_read_only(self) -> None:
        assert "tome" in METHODS
        with pytest.raises(TypeError):
            METHODS["tome"] = Thin  # type: ignore[index]

    @pytest.mark.parametrize("name", ["divprun", "DivPrune", "dvprune"])
    def test_near_names_are_suggested(self, name: str) -> None:
        with pytest.raises(UnknownMethodError, match=r"Did you mean divprune.*Known: aim, "):
            get_method(name)
        with pytest.raises(UnknownMethodError) as caught:
            get_method("zzzzz")
        assert "Did you mean" not in str(caught.value)

    def test_registering(self, names: dict) -> None:
        register_method("thin", Thin)
        assert get_method("thin") is Thin and "thin" in list_methods("th*")
        register_method("thin", Thin)  # the same once more

    def test_taken_names(self, names: dict) -> None:
        @dataclass(frozen=True)
        class Mine(Thin):
            card = card("tome")

        with pytest.raises(ValueError, match=r"as foveate.methods.tome:ToMe; pass clobber=True"):
            register_method("tome", Mine)
        register_method("tome", Mine, clobber=True)
        assert get_method("tome") is Mine

    def test_a_class_made_anew_replaces_itself(self, names: dict) -> None:
        def cell() -> type[Method]:
            @dataclass(frozen=True)
            class Again(Thin):
                card = card("again")

            return Again

        first, second = cell(), cell()
        assert first is not second
        register_method("again", first)
        register_method("again", second)
        assert get_method("again") is second

    def test_a_text_and_its_class_are_the_same(self, names: dict) -> None:
        get_method("tome")
        register_method("tome", "foveate.methods.tome:ToMe")
        assert get_method("tome").__name__ == "ToMe"

    @pytest.mark.parametrize("name", ["", "Thin", "a-b", "a b"])
    def test_malformed_names(self, names: dict, name: str) -> None:
        with pytest.raises(ValueError, match="lower case"):
            register_method(name, Thin)

    @pytest.mark.parametrize("target", ["thin", "thin:", ":Thin", Thin(), dict, Method])
    def test_malformed_targets(self, names: dict, target) -> None:
        with pytest.raises(ValueError, match=r"module:Class|subclass of|needs a class attribute"):
            register_method("thin", target)
        assert "thin" not in names

    def test_the_card_speaks_of_the_class(self, names: dict) -> None:
        with pytest.raises(ValueError, match="registered as 'thick', its card says 'thin'"):
            register_method("thick", Thin)

        class Wrong(Thin):
            card = card("wrong", "decoder")

        with pytest.raises(ValueError, match="overrides the stages projector, its card says decod"):
            register_method("wrong", Wrong)

    def test_targets_that_cannot_be_imported(self, names: dict) -> None:
        register_method("gone", "no_such_module:Gone")
        register_method("lost", "foveate.methods.tome:Lost")
        for name in ("gone", "lost"):
            with pytest.raises(ImportError, match=f"{name!r} is registered as .* cannot be import"):
                get_method(name)
        assert {"gone", "lost"} <= set(list_methods())
        with pytest.warns(UserWarning, match=r"(gone|lost) is left out: ImportError"):
            found = list_methods(stage="encoder")
        sound = [name for name in list_methods() if name not in ("gone", "lost")]
        encoder = [name for name in sound if "encoder" in get_method(name).card.stages]
        assert found == sorted(encoder) and "flowcut" in found and "holitom" not in found

    def test_listing(self) -> None:
        assert list_methods("fast*") == ["fastervlm", "fastv"]
        for stage in STAGES:
            for name in list_methods(stage=stage):
                assert stage in get_method(name).card.stages
        assert {"pool", "random", "uniform"} <= set(list_methods(kind="baseline"))
        with pytest.raises(ValueError, match="no stage 'encode'; choose from frames"):
            list_methods(stage="encode")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="no kind 'free'"):
            list_methods(kind="free")  # type: ignore[arg-type]


class TestPlugIns:
    @pytest.mark.parametrize("value", ["thin_package:Thin", "thin_package:Thin [extra]"])
    def test_an_entry_point_adds_a_method(self, plug_ins, names: dict, value: str) -> None:
        plug_ins(("thin", value))
        assert "thin" not in names, "nothing is looked up before it is needed"
        assert "thin" in list_methods()
        assert names["thin"] == "thin_package:Thin", "nor imported"
        assert get_method("thin") is Thin

    def test_entry_points_are_read_once(self, plug_ins, names: dict) -> None:
        plug_ins(("thin", "thin_package:Thin"))
        list_methods()
        del names["thin"]
        assert "thin" not in list_methods()

    def test_a_clash_is_ignored_with_a_warning(self, plug_ins) -> None:
        plug_ins(("tome", "thin_package:Thin"), ("thin", "thin_package:Thin"))
        with pytest.warns(UserWarning, match=r"plug-in tome = thin_package:Thin is ignored"):
            assert get_method("tome").__name__ == "ToMe"
        assert get_method("thin") is Thin

    def test_a_broken_plug_in_breaks_only_itself(self, plug_ins) -> None:
        plug_ins(("broken", "no_such_module:Broken"))
        assert get_method("tome").__name__ == "ToMe"
        with pytest.raises(ImportError, match="'broken' is registered as no_such_module:Broken"):
            get_method("broken")
