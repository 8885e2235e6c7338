"""`project_text_qk` against the attention weights and the cache keys of the models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from foveate.models import adapter_for
from foveate.models.rotary import project_text_qk, rotate
from tiny import TINY_FAMILIES, Sample, randomize, tiny_inputs, tiny_model


def check_layers(model: nn.Module, attentions: Any, inputs: dict[str, Any]) -> None:
    """Compare every layer's projected queries and keys with its weights and its cache."""
    seen: list[dict[str, Any]] = [{} for _ in attentions]
    handles = []
    for index, attention in enumerate(attentions):
        for name in ("q_proj", "k_proj"):
            handles.append(
                attention.get_submodule(name).register_forward_hook(
                    lambda _m, _i, out, index=index, name=name: seen[index].update({name: out})
                )
            )
        handles.append(
            attention.register_forward_hook(
                lambda _m, _a, kwargs, out, index=index: seen[index].update(
                    positions=kwargs["position_embeddings"], weights=out[1]
                ),
                with_kwargs=True,
            )
        )
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    for handle in handles:
        handle.remove()
    valid = inputs["attention_mask"].bool()
    for index, attention in enumerate(attentions):
        record = seen[index]
        q, k = project_text_qk(attention, record["q_proj"], record["k_proj"], record["positions"])
        assert k is not None
        torch.testing.assert_close(k, cache.layers[index].keys, rtol=0, atol=1e-6)
        only_q, nothing = project_text_qk(attention, record["q_proj"], None, record["positions"])
        assert nothing is None
        assert torch.equal(only_q, q)
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ keys.transpose(-1, -2) * attention.scaling
        allowed = valid[:, None, None, :] & torch.ones_like(scores[0, 0]).tril().bool()
        probabilities = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        for row, mask in enumerate(valid):
            torch.testing.assert_close(
                probabilities[row][:, mask], record["weights"][row][:, mask], rtol=0, atol=1e-6
            )


@pytest.mark.parametrize("family", TINY_FAMILIES)
def test_equals_the_layer_in_every_family(family: str) -> None:
    model = tiny_model(family, attn="eager")
    samples = (Sample((3, 2, 4), ("image", "image")), Sample((5, 7), ("image",)))
    attentions = adapter_for(model).text_attentions(model)
    check_layers(model, attentions, tiny_inputs(family, samples=samples))


SMALL = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("model_type", "extra"),
    [
        ("olmo2", {}),  # norms over all heads at once
        ("qwen3", {"head_dim": 16}),  # norms per head
        ("stablelm", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    ],
)
def test_equals_the_layer_in_other_language_models(model_type: str, extra: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **SMALL, **extra)
    if "rope_parameters" in extra:
        config.rope_parameters["rope_theta"] = 1000.0
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    randomize(model, seed=3)
    ids = torch.randint(3, 50, (2, 9), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    check_layers(model, [layer.self_attn for layer in model.model.layers], inputs)


def test_sections_of_three_axes_merge_as_in_qwen2_vl() -> None:
    """Older transformers hand M-RoPE layers one (cos, sin) per axis."""
    attention = nn.Module()
    attention.head_dim = 8
    attention.config = type("Config", (), {"rope_parameters": {"mrope_section": [2, 1, 1]}})()
    angles = torch.rand(3, 1, 5, 4)
    angles = torch.cat([angles, angles], dim=-1)
    q_raw = torch.randn(1, 5, 16)
    q, _ = project_text_qk(attention, q_raw, None, (angles.cos(), angles.sin()))
    # Channels 0, 1 turn with time, 2 with the row, 3 with the column; the second half alike.
    axis = torch.tensor([0, 0, 1, 2, 0, 0, 1, 2])
    merged = torch.stack([angles[a, ..., c] for c, a in enumerate(axis.tolist())], dim=-1)
    expected = rotate(q_raw.view(1, 5, 2, 8).transpose(1, 2), merged.cos(), merged.sin())
    assert torch.equal(q, expected)


def test_rotation_keeps_lengths_and_depends_on_distance_only() -> None:
    q, k = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    frequencies = torch.tensor([1.0, 0.5, 0.2, 0.1]).repeat(2)

    def at(x: torch.Tensor, position: float) -> torch.Tensor:
        return rotate(x, (position * frequencies).cos(), (position * frequencies).sin())

    torch.testing.assert_close(at(q, 3.0).norm(), q.norm())
    torch.testing.assert_close(at(q, 5.0) @ at(k, 2.0), at(q, 9.0) @ at(k, 6.0))
    assert not torch.isclose(at(q, 5.0) @ at(k, 2.0), at(q, 9.0) @ at(k, 2.0))
