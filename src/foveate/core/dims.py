"""Dimensions of encoders, projectors and language models: what their FLOPs depend on, as numbers.

`foveate.models.dims` reads them from transformers models; `foveate.core.flops` counts with them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TransformerDims:
    """The dimensions of a language model that its FLOPs depend on.

    Args:
        num_layers: decoder layers.
        hidden: width d of the residual stream.
        heads: query heads.
        kv_heads: key/value heads (fewer than `heads` in grouped-query attention).
        head_dim: width of one head.
        intermediate: width m inside the MLP.
        gated: the MLP has three matrices (gate, up, down) instead of two.
        vocab: entries of the output vocabulary; None leaves the output head out.
    """

    num_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool = True
    vocab: int | None = None

    def __post_init__(self) -> None:
        _check_positive(self)

    @property
    def attention_linear(self) -> int:
        """FLOPs of the q, k, v and output projections for one token in one layer."""
        return 2 * self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)

    @property
    def mlp(self) -> int:
        """FLOPs of the MLP for one token in one layer."""
        return 2 * (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def attention_pair(self) -> int:
        """FLOPs of one (query, key) pair in one layer: a score and a weighted value, all heads."""
        return 4 * self.heads * self.head_dim

    @property
    def head(self) -> int:
        """FLOPs of the output head for one token."""
        return 2 * self.hidden * (self.vocab or 0)


@dataclass(frozen=True)
class EncoderDims:
    """The dimensions of a vision transformer that its FLOPs depend on.

    Args:
        num_blocks: transformer blocks that are run.
        hidden: width d of the residual stream.
        heads: attention heads.
        head_dim: width of one head.
        intermediate: width m inside the MLP.
        patch_inputs: numbers in one patch (channels x frames per patch x patch area).
        gated: the MLP has three matrices instead of two.
        attention_pool: an attention pooling head runs after the blocks (standalone SigLIP).
        window: side of an attention window in patches; 0 when no block uses windows.
        full_blocks: blocks (from 0) without windows; only read when `window` > 0.
    """

    num_blocks: int
    hidden: int
    heads: int
    head_dim: int
    intermediate: int
    patch_inputs: int
    gated: bool = False
    attention_pool: bool = False
    window: int = 0
    full_blocks: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        _check_positive(self, but=("window",))

    @property
    def attention_linear(self) -> int:
        """FLOPs of the q, k, v and output projections for one token in one block."""
        return 8 * self.hidden * self.heads * self.head_dim

    @property
    def mlp(self) -> int:
        """FLOPs of the MLP for one token in one block."""
        return 2 * (3 if self.gated else 2) * self.hidden * self.intermediate

    @property
    def attention_pair(self) -> int:
        """FLOPs of one (query, key) pair in one block, all heads."""
        return 4 * self.heads * self.head_dim

    @property
    def patch_embedding(self) -> int:
        """FLOPs of embedding one patch."""
        return 2 * self.patch_inputs * self.hidden

    def pool(self, keys: int) -> int:
        """FLOPs of the attention pooling head over `keys` tokens; 0 without such a head."""
        if not self.attention_pool:
            return 0
        projections = 2 * self.hidden * self.hidden * (2 + 2 * keys)  # q and output, then k and v
        return projections + 4 * self.hidden * keys + 4 * self.hidden * self.intermediate


@dataclass(frozen=True)
class ProjectorDims:
    """The linear layers between encoder and language model.

    Args:
        linears: (inputs, outputs) of every linear layer, each applied to every row.
        tokens_factor: encoder tokens that are joined into one row (4 for a 2 x 2 merge).
    """

    linears: tuple[tuple[int, int], ...]
    tokens_factor: int = 1

    def __post_init__(self) -> None:
        _check_positive(self)


def _check_positive(
    dims: TransformerDims | EncoderDims | ProjectorDims, but: tuple[str, ...] = ()
) -> None:
    for name, value in vars(dims).items():
        if isinstance(value, int) and not isinstance(value, bool) and name not in but and value < 1:
            raise ValueError(f"{type(dims).__name__}.{name} must be >= 1, got {value}.")
