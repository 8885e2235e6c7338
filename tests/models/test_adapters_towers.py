"""Vision towers: queries, keys, windows, MLP branches and features against what the model does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from adapter_calls import CASES, run

from foveate.models import adapter_for
from foveate.models.tower import VisionTower
from tiny import TINY_ENCODERS, Sample, tiny_encoder, tiny_inputs, tiny_model


@dataclass
class Trace:
    """What went through the modules of a tower in one forward."""

    taps: list[dict[str, torch.Tensor]]
    attention_inputs: list[tuple[torch.Tensor, dict[str, Any]]]
    attention_outputs: list[Any]
    attention_weights: list[torch.Tensor]
    mlp_inputs: list[torch.Tensor]
    mlp_outputs: list[torch.Tensor]
    blocks: list[torch.Tensor]


def traced(tower: VisionTower, forward: Any) -> Trace:
    trace = Trace([{} for _ in tower.blocks], [], [], [], [], [], [])

    def attention(_m: Any, args: Any, kwargs: Any, out: Any) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        trace.attention_inputs.append((hidden, kwargs))
        trace.attention_outputs.append(out)

    def weights(_m: Any, _i: Any, out: Any) -> None:
        if isinstance(out, tuple):
            trace.attention_weights.append(out[1])

    def tap(index: int, name: str) -> Any:
        return lambda _m, _i, out: trace.taps[index].update({name: out})

    handles = []
    for index, block in enumerate(tower.blocks):
        for name, module in tower.qk_taps(index).items():
            handles.append(module.register_forward_hook(tap(index, name)))
        handles += [
            tower.attentions[index].register_forward_hook(attention, with_kwargs=True),
            # transformers < 5.20 has the attention proper of DINOv2 one level deeper.
            getattr(
                tower.attentions[index], "attention", tower.attentions[index]
            ).register_forward_hook(weights),
            tower.mlp_inputs[index].register_forward_pre_hook(
                lambda _m, args: trace.mlp_inputs.append(args[0])
            ),
            tower.mlp_outputs[index].register_forward_hook(
                lambda _m, _i, out: trace.mlp_outputs.append(out)
            ),
            block.register_forward_hook(lambda _m, _i, out: trace.blocks.append(out)),
        ]
    with torch.no_grad():
        forward()
    for handle in handles:
        handle.remove()
    return trace


def towers_under_test() -> list[Any]:
    return [pytest.param(*case, id="-".join(case)) for case in CASES] + [
        pytest.param(family, None, id=family) for family in TINY_ENCODERS
    ]


def trace_of(family: str, modality: str | None) -> tuple[VisionTower, Trace]:
    if modality is None:
        model = tiny_encoder(family, attn="eager")
        tower = adapter_for(model).tower(model)
        return tower, traced(tower, lambda: model(torch.randn(2, 3, 48, 48)))
    model = tiny_model(family, attn="eager")
    tower = adapter_for(model).towers(model)[modality]
    inputs = tiny_inputs(family, samples=(Sample((3, 2, 4), (modality, modality)),))
    return tower, traced(tower, lambda: model(**inputs))


@pytest.mark.parametrize(("family", "modality"), towers_under_test())
def test_queries_and_keys_are_those_of_the_attention(family: str, modality: str | None) -> None:
    tower, trace = trace_of(family, modality)
    for index in range(len(tower.blocks)):
        hidden, kwargs = trace.attention_inputs[index]
        q, k = tower.assemble_qk(index, trace.taps[index], kwargs)
        scores = q @ k.transpose(-1, -2) * tower.head_dim**-0.5
        cu_seqlens = tower.segments(index, kwargs)
        if not tower.packed:
            assert cu_seqlens is None
            weights = trace.attention_weights[index]
            torch.testing.assert_close(scores.softmax(-1), weights, rtol=0, atol=1e-6)
            continue
        # Packed attention gives no weights: finish it by hand and compare what it put out.
        segment = torch.bucketize(torch.arange(q.shape[2]), cu_seqlens[1:-1], right=True)
        scores = scores.masked_fill(segment[:, None] != segment, -torch.inf)
        attention = tower.attentions[index]
        if "qkv" in trace.taps[index]:
            value, out_proj = trace.taps[index]["qkv"].chunk(3, dim=-1)[2], attention.proj
        else:
            value, out_proj = attention.v_proj(hidden), attention.out_proj
        value = value.unflatten(-1, (tower.num_heads, tower.head_dim)).transpose(0, 1)
        expected = trace.attention_outputs[index]
        expected = expected[0] if isinstance(expected, tuple) else expected
        with torch.no_grad():
            mixed = out_proj((scores[0].softmax(-1) @ value).transpose(0, 1).flatten(1))
        torch.testing.assert_close(mixed, expected, rtol=0, atol=2e-6)


def test_segments_of_qwen2_5_vl_are_windows_except_in_full_blocks() -> None:
    tower, trace = trace_of("qwen2_5_vl", "video")
    sizes = [
        tower.segments(index, trace.attention_inputs[index][1]).diff().tolist()
        for index in range(4)
    ]
    assert sizes == [[16] * 16, [64] * 4, [16] * 16, [64] * 4]


@pytest.mark.parametrize(("family", "modality"), towers_under_test())
def test_blocks_add_their_mlp_to_the_stream_after_attention(
    family: str, modality: str | None
) -> None:
    tower, trace = trace_of(family, modality)
    for index in range(len(tower.blocks)):
        added = trace.mlp_outputs[index]
        gain = tower.mlp_gain(index)
        assert (gain is not None) == (family == "internvl")
        total = trace.mlp_inputs[index] + (added if gain is None else gain * added)
        torch.testing.assert_close(total, trace.blocks[index], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("family", "modality"), CASES)
def test_features_come_from_the_feature_block(family: str, modality: str) -> None:
    call = run(family, modality)
    tower = call.tower
    before = torch.cat(call.items)
    changed = []
    for block in tower.blocks[tower.feature_block :]:
        handle = block.register_forward_hook(lambda _m, _i, out: out * 2 + 1, prepend=True)
        call.encode_again()
        handle.remove()
        after = torch.cat(call.items)
        changed.append(not torch.equal(before, after))
    assert changed == [True] + [False] * (len(changed) - 1)
    is_clip = family in ("llava", "llava_next", "llava_next_video", "video_llava")
    assert len(changed) == (2 if is_clip else 1)


def test_assemble_qk_names_what_is_missing() -> None:
    tower, trace = trace_of("clip", None)
    with pytest.raises(ValueError, match=r"\['k'\] were not captured"):
        tower.assemble_qk(0, {"q": trace.taps[0]["q"]}, {})


@pytest.mark.parametrize("family", TINY_ENCODERS)
def test_encoder_grids_count_the_hidden_states(family: str) -> None:
    model = tiny_encoder(family)
    adapter = adapter_for(model)
    pixels = torch.randn(2, 3, 48, 48)
    tower, grid = adapter.tower(model), adapter.grid(model, pixels)
    hidden = model(pixels).last_hidden_state
    assert grid.num_tokens == hidden.shape[1]
    assert tower.num_prefix == grid.planes[0].prefix == hidden.shape[1] - 36
    assert tower.has_cls == (family != "siglip")
    assert tower.module is model
    assert tower.feature_block == 3
    assert [picture.shape for picture in adapter.pixels(pixels)] == [(1, 3, 48, 48)] * 2


def test_encoders_inside_other_models_are_found() -> None:
    from transformers import (
        CLIPConfig,
        CLIPModel,
        Dinov2Config,
        Dinov2ForImageClassification,
        SiglipConfig,
        SiglipModel,
        ViTConfig,
        ViTForImageClassification,
    )

    small = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    vision = {**small, "num_hidden_layers": 2, "image_size": 16, "patch_size": 8}
    text = {**small, "num_hidden_layers": 3, "vocab_size": 20}
    pairs = {"text_config": text, "vision_config": vision}
    for model, inner in (
        (CLIPModel(CLIPConfig(**pairs)), "vision_model"),
        (SiglipModel(SiglipConfig(**pairs)), "vision_model"),
        (ViTForImageClassification(ViTConfig(**vision)), "vit"),
        (Dinov2ForImageClassification(Dinov2Config(**vision)), "dinov2"),
    ):
        tower = adapter_for(model).tower(model)
        assert tower.module is getattr(model, inner)
        assert len(tower.blocks) == 2
