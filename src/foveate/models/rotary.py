"""Queries and keys of language-model attention, computed as the layer computes them.

Legend: B batch, N tokens, H query heads, G key heads, D channels of a head, R rotated channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding in the split-half form, on the first `cos.shape[-1]` channels.

    `cos` and `sin` broadcast against x [..., D]; channels past R pass unrotated (partial rotary).
    Source: RoFormer, arXiv 2104.09864, with the channel order of Llama.
    """
    rotary_dim = cos.shape[-1]
    x_rotated, x_passed = x[..., :rotary_dim], x[..., rotary_dim:]
    first, second = x_rotated.chunk(2, dim=-1)
    x_rotated = x_rotated * cos + torch.cat((-second, first), dim=-1) * sin
    return torch.cat((x_rotated, x_passed), dim=-1) if x_passed.shape[-1] else x_rotated


def project_text_qk(
    attention: nn.Module,
    q_raw: Tensor,
    k_raw: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
) -> tuple[Tensor, Tensor | None]:
    """Queries and keys of a decoder layer from the outputs of its `q_proj` and `k_proj`.

    Covers the attention of Llama, Mistral, Qwen2, Qwen2-VL, Qwen2.5-VL, Qwen3 and Qwen3-VL: norms
    of queries and keys where there are any (per head, or over all heads at once), then rotary
    positions. Any rows may be given, not only all of them, as long as the positions match.

    Args:
        attention: the attention module (read for `head_dim`, `q_norm`, `k_norm`).
        q_raw: [B, N, H * D].
        k_raw: [B, N, G * D], or None when only queries are wanted.
        position_embeddings: (cos, sin), each [B or 1, N, R], or [3, B, N, R] as older versions of
            transformers hand them to M-RoPE models.

    Returns:
        q [B, H, N, D] and k [B, G, N, D] (or None), in the dtype of the inputs.

    Example:
        >>> attention = nn.Module()
        >>> attention.head_dim = 4
        >>> cos, sin = torch.ones(1, 3, 4), torch.zeros(1, 3, 4)
        >>> q, k = project_text_qk(attention, torch.rand(1, 3, 8), torch.rand(1, 3, 4), (cos, sin))
        >>> q.shape, k.shape
        (torch.Size([1, 2, 3, 4]), torch.Size([1, 1, 3, 4]))
    """
    q_BHND = _project(attention, q_raw, "q_norm", position_embeddings)
    if k_raw is None:
        return q_BHND, None
    return q_BHND, project_text_k(attention, k_raw, position_embeddings)


def project_text_k(
    attention: nn.Module, k_raw: Tensor, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    """Keys [B, G, N, D] of a decoder layer from its `k_proj` alone; see `project_text_qk`."""
    return _project(attention, k_raw, "k_norm", position_embeddings)


def _project(
    attention: nn.Module, raw: Tensor, norm_name: str, position_embeddings: tuple[Tensor, Tensor]
) -> Tensor:
    cos, sin = (_merge_sections(part, attention)[:, None] for part in position_embeddings)
    norm: Any = getattr(attention, norm_name, None)
    head_dim: Any = attention.head_dim
    x_BNHD = raw.unflatten(-1, (-1, head_dim))
    if norm is not None:
        # Qwen3 normalises each head, OLMo and others the whole row: the weight's size tells.
        x_BNHD = norm(x_BNHD) if norm.weight.numel() == head_dim else norm(raw).view_as(x_BNHD)
    return rotate(x_BNHD.transpose(1, 2), cos, sin)


def _merge_sections(part: Tensor, attention: nn.Module) -> Tensor:
    """[3, B, N, R] of time, row and column positions -> [B, N, R], as Qwen2-VL's M-RoPE does."""
    if part.dim() == 3:
        return part
    config: Any = attention.config
    sections = [*config.rope_parameters["mrope_section"]] * 2
    chunks = part.split(sections, dim=-1)
    return torch.cat([chunk[i % 3] for i, chunk in enumerate(chunks)], dim=-1)
