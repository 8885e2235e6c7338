"""Vista-LLaMA's attention against the official code: prefill, weights and decoding."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from foveate.attach.cache import ReducedLayer
from foveate.attach.equal_distance import mixed_attention
from foveate.core import RuleContext
from foveate.methods.vista_llama import VistaLLaMA

from .golden_cases import Case, cases

TOLERANCE = {"atol": 2e-6, "rtol": 1e-5}


def attention_of(case: Case, kind: str) -> nn.Module:
    """The official weights as the attention module of a Llama-like layer."""
    module: Any = nn.Module()
    module.head_dim = case.args["head_dim"]
    module.scaling = module.head_dim**-0.5
    module.config = SimpleNamespace(_attn_implementation=kind)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        weight = case[f"sd.{name}.weight"]
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = nn.Parameter(weight)
        setattr(module, name, linear)
    return module


def rotary(case: Case, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    dim, base = case.args["head_dim"], case.args["rope_base"]
    frequencies = base ** (-torch.arange(0, dim, 2).double() / dim)
    angle = (positions[:, None] * frequencies).repeat(1, 2)[None]
    return angle.cos().float(), angle.sin().float()


def flags_of(case: Case) -> torch.Tensor:
    """What the method says of every token, bool [B, L]."""
    rows = []
    for mask_L in case["visual_mask"]:
        context = RuleContext(
            None,  # pyright: ignore[reportArgumentType]
            visual_N=mask_L.nonzero()[:, 0],
            column_S=torch.arange(len(mask_L)),
        )
        rows.append(VistaLLaMA().attention_rule(context).unrotated_S)
    return torch.stack(rows)


@cases("vista_llama", "x", "prefill_out", "prefill_attn")
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_prefill(case: Case, kind: str) -> None:
    L = case["visual_mask"].shape[1]
    attention, embeddings = attention_of(case, kind), rotary(case, torch.arange(L))
    with torch.no_grad():
        out, weights = mixed_attention(
            attention, case["x"][:, :L], embeddings, None, flags_of(case)
        )
        plain, _ = mixed_attention(
            attention, case["x"][:, :L], embeddings, None, torch.zeros_like(flags_of(case))
        )
    torch.testing.assert_close(out, case["prefill_out"], **TOLERANCE)
    torch.testing.assert_close(plain, case["plain_rope_out"], **TOLERANCE)
    assert (out - plain).abs().max() > 1e-3
    assert (weights is None) == (kind == "sdpa")
    if weights is not None:
        torch.testing.assert_close(weights, case["prefill_attn"], **TOLERANCE)


@cases("vista_llama", "x", "decode_out", "decode_attn_to_visual")
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_decoding_with_the_cache(case: Case, kind: str) -> None:
    first, last = case.args["visual_span"]
    flags_BL = flags_of(case)
    B, L = flags_BL.shape
    attention, layer = attention_of(case, kind), ReducedLayer()
    cache = SimpleNamespace(update=lambda keys, values, _: layer.update(keys, values))
    outs, weights = [], []
    with torch.no_grad():
        for start, end in [(0, L), *((n, n + 1) for n in range(L, case["x"].shape[1]))]:
            new = flags_BL if start == 0 else None
            layer.expect(None, end - start, new)
            flags = torch.nn.functional.pad(flags_BL, (0, end - L))
            out, shown = mixed_attention(
                attention,
                case["x"][:, start:end],
                rotary(case, torch.arange(start, end)),
                None,
                flags,
                cache=cache,
            )
            assert layer.unrotated_BT is not None and layer.unrotated_BT.equal(flags)
            outs.append(out)
            weights.append(shown)
    torch.testing.assert_close(torch.cat(outs[1:], 1), case["decode_out"], **TOLERANCE)
    assert layer.kv[0].shape == (B, case.args["heads"], case["x"].shape[1], case.args["head_dim"])
    if kind == "eager":
        to_visual = torch.cat([step[..., first:last] for step in weights[1:]], dim=2)
        torch.testing.assert_close(to_visual, case["decode_attn_to_visual"], **TOLERANCE)
