"""Finding adapters: unknown models, registration from outside, entry points."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import ClassVar

import pytest
import torch
from torch import nn

from foveate.errors import FoveateError, UnknownModelError, UnsupportedModelError
from foveate.models import (
    ADAPTERS,
    adapter_for,
    list_families,
    register_adapter,
    registry,
    unregister_adapter,
)
from foveate.models.llava import LlavaAdapter
from tiny import TINY_ENCODERS, TINY_FAMILIES, Sample, tiny_inputs, tiny_model


class VipLlavaAdapter(LlavaAdapter):
    """The worked example of docs/adapters.md."""

    family = "vipllava"
    model_types = ("vipllava",)
    docs_name = "ViP-LLaVA"
    feature_layer_key = "vision_feature_layers"


@pytest.fixture(autouse=True)
def _families_as_they_were() -> Iterator[None]:
    before = dict(registry._ADAPTERS)
    yield
    registry._ADAPTERS.clear()
    registry._ADAPTERS.update(before)


def vip_llava() -> nn.Module:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    small = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": 4, "image_size": 24, "patch_size": 8}
    text = {**small, "num_hidden_layers": 2, "vocab_size": 120, "num_key_value_heads": 2}
    config = VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **vision},
        text_config={"model_type": "llama", **text},
        image_token_index=110,
        vision_feature_layers=[1, 3, -2],
    )
    return VipLlavaForConditionalGeneration(config).eval()


#: They have tests of their own: test_backbones.py here and test_backbone_methods.py.
BACKBONES = ("mixste", "vision_mamba", "vis4mer")
#: Likewise: test_timm_encoders.py and test_swin.py.
OTHERS = ("timm", "swin")


def test_all_families_are_listed_and_tested() -> None:
    assert list_families() == tuple(
        sorted({*TINY_FAMILIES, *TINY_ENCODERS, *BACKBONES, *OTHERS} - {"dinov2_with_registers"})
    )
    for family, entry in ADAPTERS.items():
        adapter = registry._resolve(entry.target)
        assert (adapter.family, adapter.model_types) == (family, entry.model_types)
        assert adapter.docs_name
        assert adapter.__doc__


def test_an_unknown_model_is_told_what_is_known() -> None:
    model = vip_llava()
    with pytest.raises(UnknownModelError) as caught:
        adapter_for(model)
    message = str(caught.value)
    assert "VipLlavaForConditionalGeneration (model_type 'vipllava')" in message
    assert "docs/adapters.md" in message
    for family in list_families():
        assert family in message
    assert isinstance(caught.value, FoveateError)
    assert isinstance(caught.value, ValueError)
    with pytest.raises(UnknownModelError, match="Linear \\(model_type None\\)"):
        adapter_for(nn.Linear(2, 2))


@pytest.mark.parametrize("target", [VipLlavaAdapter, f"{__name__}:VipLlavaAdapter"])
def test_a_family_registered_from_outside_works(target: str | type) -> None:
    register_adapter("vipllava", target, ["vipllava"])
    model = vip_llava()
    adapter = adapter_for(model)
    assert type(adapter).__name__ == "VipLlavaAdapter"
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        features = model.model.get_image_features(pixels)
    features = getattr(features, "pooler_output", features)
    grids = adapter.grids(model, "image", {"pixel_values": pixels}, features)
    assert [len(item) for item in adapter.split_features(model, features, grids)] == [9, 9]
    assert adapter.towers(model)["image"].feature_block == 2
    unregister_adapter("vipllava")
    with pytest.raises(UnknownModelError):
        adapter_for(model)


def test_registration_does_not_overwrite_silently() -> None:
    with pytest.raises(ValueError, match="'llava' has an adapter; pass clobber=True"):
        register_adapter("llava", VipLlavaAdapter, ["vipllava"])
    with pytest.raises(ValueError, match="'llava' is served by the family 'llava'"):
        register_adapter("other", VipLlavaAdapter, ["llava"])
    with pytest.raises(ValueError, match=r'named "package\.module:Class", got \'nonsense\''):
        register_adapter("other", "nonsense", ["other"])
    register_adapter("other", VipLlavaAdapter, ["llava"], clobber=True)
    assert type(adapter_for(tiny_model("llava"))) is VipLlavaAdapter


def test_installed_packages_add_families(monkeypatch: pytest.MonkeyPatch) -> None:
    def entry_points(group: str) -> list[EntryPoint]:
        assert group == "foveate.adapters"
        return [
            EntryPoint("broken", "no_such_package:Adapter", group),
            EntryPoint("vipllava", f"{__name__}:VipLlavaAdapter", group),
        ]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    with pytest.warns(UserWarning, match="'broken'.*no_such_package"):
        adapter = adapter_for(vip_llava())
    assert adapter.family == "vipllava"
    assert "vipllava" in ADAPTERS


def test_the_view_is_read_only() -> None:
    with pytest.raises(TypeError):
        ADAPTERS["llava"] = ADAPTERS["llava_next"]  # type: ignore[index]


def test_importing_the_registry_imports_no_framework() -> None:
    code = (
        "import sys, foveate.models; foveate.models.list_families();"
        "sys.exit(bool({'torch', 'transformers'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_encoder_without_cls_whose_first_patch_would_go_is_refused() -> None:
    model = tiny_model("llava_onevision", vision_feature_select_strategy="default")
    adapter = adapter_for(model)
    inputs = tiny_inputs("llava_onevision", samples=(Sample((1, 1), ("video",)),))
    arguments = {"pixel_values_videos": inputs["pixel_values_videos"]}
    with pytest.raises(UnsupportedModelError, match='set it to "full"'):
        adapter.grids(model, "video", arguments, None)


def test_an_unknown_encoder_inside_a_known_family_is_named() -> None:
    from foveate.models.tower import build_tower

    class Strange(nn.Module):
        config: ClassVar = type("Config", (), {"model_type": "strange"})()

    with pytest.raises(
        UnsupportedModelError, match=r"Strange \(model_type 'strange'\).*clip_vision"
    ):
        build_tower(Strange())


def test_a_model_without_the_parts_of_its_family_is_refused() -> None:
    model = tiny_model("llava")
    del model.model.vision_tower
    with pytest.raises(UnsupportedModelError, match="no module with language_model, vision_tower"):
        adapter_for(model).base(model)
