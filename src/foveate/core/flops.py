"""Floating point operations of a vision-language model, from dimensions and token counts alone.

One rule: a multiply-add is 2 FLOPs; linear layers, convolutions and the two attention products are
counted; norms, softmax, activations, rotary embeddings, embedding look-ups and biases are not.
Causal attention is counted in full (queries x keys), as `torch.utils.flop_counter` counts it, so
that both give the same figure. docs/flops.md states the formulas and relates them to the papers'.

Legend: d hidden width, H query heads, G key/value heads, e width of a head, m width of the MLP,
q query tokens, k key tokens, V entries of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypeAlias

from foveate.core.dims import EncoderDims, ProjectorDims, TransformerDims

Stage: TypeAlias = Literal["encoder", "projector", "prefill", "decode", "total"]
PerLayer: TypeAlias = int | Sequence[int]
PerBlock: TypeAlias = int | Sequence[int | Sequence[int]]

__all__ = [
    "EncoderDims",
    "FlopsBreakdown",
    "ProjectorDims",
    "TransformerDims",
    "decode_flops",
    "encoder_flops",
    "encoder_segments",
    "prefill_flops",
    "projector_flops",
    "published_flops",
]


@dataclass(frozen=True)
class FlopsBreakdown:
    """FLOPs of one run, stage by stage.

    Example:
        >>> full = FlopsBreakdown(encoder=10, prefill=80, decode=10)
        >>> reduced = FlopsBreakdown(encoder=10, prefill=8, decode=7)
        >>> reduced.total, reduced.ratio(full), reduced.ratio(full, "prefill")
        (25, 0.25, 0.1)
    """

    encoder: int = 0
    projector: int = 0
    prefill: int = 0
    decode: int = 0

    @property
    def total(self) -> int:
        """All stages together."""
        return self.encoder + self.projector + self.prefill + self.decode

    def as_dict(self) -> dict[str, int]:
        """The four stages and their total, ready for JSON."""
        return {**asdict(self), "total": self.total}

    def ratio(self, untouched: FlopsBreakdown, stage: Stage = "total") -> float:
        """This run's share of the FLOPs of the untouched run: 0.15 is 15 % of the cost.

        Args:
            untouched: the same input through the model without any reduction.
            stage: "encoder", "projector", "prefill", "decode" or "total".

        Raises:
            ValueError: unknown stage, or the untouched run spends nothing where this one does.
        """
        mine, theirs = self.as_dict(), untouched.as_dict()
        if stage not in mine:
            raise ValueError(f"stage must be one of {', '.join(mine)}, got {stage!r}.")
        if theirs[stage] == 0 and mine[stage] > 0:
            raise ValueError(
                f"The untouched run has 0 FLOPs in stage {stage!r} and this one {mine[stage]}; "
                "compare runs of the same input."
            )
        return mine[stage] / theirs[stage] if theirs[stage] else 1.0

    def __add__(self, other: FlopsBreakdown) -> FlopsBreakdown:
        return FlopsBreakdown(
            self.encoder + other.encoder,
            self.projector + other.projector,
            self.prefill + other.prefill,
            self.decode + other.decode,
        )


def prefill_flops(
    dims: TransformerDims,
    lengths: PerLayer,
    kv_lengths: PerLayer | None = None,
    logits_for: int = 1,
    attention_pairs: Sequence[int] | None = None,
) -> int:
    """FLOPs of one sequence's prefill when every layer may see another number of tokens.

    Args:
        dims: the language model.
        lengths: query tokens of every layer; an int stands for the same number in all of them.
        kv_lengths: key tokens of every layer (cached ones included); None means no past, so the
            keys are the queries.
        logits_for: tokens that go through the output head; `generate()` needs 1.
        attention_pairs: products of a query and a key in every layer, where not every query meets
            every key (prompts read in blocks); replaces queries x keys.

    Returns:
        FLOPs, an exact integer.

    Raises:
        ValueError: not one length per layer, or a negative number.

    Example:
        >>> dims = TransformerDims(2, 8, heads=2, kv_heads=1, head_dim=4, intermediate=16)
        >>> prefill_flops(dims, 10), prefill_flops(dims, [10, 5])
        (29440, 21280)
    """
    queries = _per_layer("lengths", lengths, dims.num_layers)
    keys = queries
    if kv_lengths is not None:
        keys = _per_layer("kv_lengths", kv_lengths, dims.num_layers)
    pairs = sum(query * key for query, key in zip(queries, keys, strict=True))
    if attention_pairs is not None:
        pairs = sum(_per_layer("attention_pairs", attention_pairs, dims.num_layers))
    linear = (dims.attention_linear + dims.mlp) * sum(queries)
    return linear + dims.attention_pair * pairs + dims.head * _count("logits_for", logits_for)


def decode_flops(dims: TransformerDims, kv_lengths: PerLayer, num_new_tokens: int) -> int:
    """FLOPs of decoding one token at a time on a cache whose layers may differ in length.

    Args:
        dims: the language model.
        kv_lengths: keys in every layer's cache before the first step; an int stands for all layers.
        num_new_tokens: decoding steps. The first token of an answer comes out of the prefill, so an
            answer of n tokens takes n - 1 steps.

    Returns:
        FLOPs, an exact integer; step t (from 1) attends to kv_lengths + t keys.

    Raises:
        ValueError: not one length per layer, or a negative number.
    """
    steps = _count("num_new_tokens", num_new_tokens)
    keys = _per_layer("kv_lengths", kv_lengths, dims.num_layers)
    per_step = (dims.attention_linear + dims.mlp) * dims.num_layers + dims.head
    pairs = steps * sum(keys) + dims.num_layers * (steps * (steps + 1) // 2)
    return per_step * steps + dims.attention_pair * pairs


def encoder_flops(
    dims: EncoderDims,
    lengths: PerBlock,
    num_sequences: int = 1,
    *,
    mlp_lengths: PerLayer | None = None,
    num_patches: int | None = None,
) -> int:
    """FLOPs of a vision transformer over images, frames or a packed batch of them.

    Args:
        dims: the encoder.
        lengths: one entry per block: the tokens of one sequence ([CLS] and registers included), or
            the lengths of the segments that attend only to themselves (windows, packed frames; see
            `encoder_segments`). An int stands for the same number in all blocks.
        num_sequences: sequences of that shape: images, tiles, or frames.
        mlp_lengths: tokens of one sequence in every block's MLP, for methods that merge between
            attention and MLP (ToMe); None means as many as in its attention.
        num_patches: patches embedded per sequence; None means the first block's tokens.

    Returns:
        FLOPs, an exact integer.

    Raises:
        ValueError: not one length per block, or a negative number.

    Example:
        >>> dims = EncoderDims(2, 8, heads=2, head_dim=4, intermediate=16, patch_inputs=12)
        >>> encoder_flops(dims, 10), encoder_flops(dims, [(5, 5), 10])
        (28800, 27200)
    """
    entries = [lengths] * dims.num_blocks if isinstance(lengths, int) else lengths
    segments = [(entry,) if isinstance(entry, int) else entry for entry in entries]
    tokens = _per_layer("lengths", [sum(entry) for entry in segments], dims.num_blocks)
    mlp_tokens = tokens
    if mlp_lengths is not None:
        mlp_tokens = _per_layer("mlp_lengths", mlp_lengths, dims.num_blocks)
    patches = tokens[0] if num_patches is None else _count("num_patches", num_patches)
    pairs = sum(length * length for entry in segments for length in entry)
    sequence = (
        dims.patch_embedding * patches
        + dims.attention_linear * sum(tokens)
        + dims.attention_pair * pairs
        + dims.mlp * sum(mlp_tokens)
        + dims.pool(mlp_tokens[-1])
    )
    return sequence * _count("num_sequences", num_sequences)


def encoder_segments(
    dims: EncoderDims, grids: Iterable[Sequence[int]]
) -> list[int | Sequence[int]]:
    """Attention segments of every block of a packed encoder, ready for `encoder_flops`.

    Every frame attends to itself; in blocks with windows every window does (Qwen2.5-VL, arXiv
    2502.13923, section 2.1.1; windows at the right and bottom edge are smaller).

    Args:
        dims: the encoder.
        grids: (frames, rows, columns) in patches of every image or video in the batch.

    Example:
        >>> dims = EncoderDims(2, 8, 2, 4, 16, 12, window=8, full_blocks=(1,))
        >>> encoder_segments(dims, [(1, 8, 12)])
        [(64, 32), (96,)]
    """
    grids = [tuple(grid) for grid in grids]
    frames = tuple(rows * columns for time, rows, columns in grids for _ in range(time))
    if not dims.window:
        return [frames] * dims.num_blocks
    windows = tuple(
        height * width
        for time, rows, columns in grids
        for _ in range(time)
        for height in _chunks(rows, dims.window)
        for width in _chunks(columns, dims.window)
    )
    return [frames if index in dims.full_blocks else windows for index in range(dims.num_blocks)]


def projector_flops(dims: ProjectorDims, num_tokens: int) -> int:
    """FLOPs of the projector for `num_tokens` encoder tokens.

    Raises:
        ValueError: a negative number, or one that does not divide into rows of `tokens_factor`.

    Example:
        >>> projector_flops(ProjectorDims(((32, 16), (16, 16)), tokens_factor=4), 8)
        3072
    """
    if _count("num_tokens", num_tokens) % dims.tokens_factor:
        raise ValueError(
            f"{num_tokens} encoder tokens do not divide into rows of {dims.tokens_factor}; pass "
            "the number of tokens that enter the merge."
        )
    rows = num_tokens // dims.tokens_factor
    return 2 * rows * sum(inputs * outputs for inputs, outputs in dims.linears)


def published_flops(layers: int, d: int, m: int, n: PerLayer) -> int:
    """Prefill cost as most token-reduction papers print it: layers * (4nd^2 + 2n^2d + 2ndm).

    It counts a multiply-add once and knows neither grouped-query attention nor gated MLPs; use it
    to compare with a paper's table and `prefill_flops` for everything else (see docs/flops.md).

    Args:
        layers: decoder layers.
        d: hidden width.
        m: width of the MLP.
        n: tokens (visual, or visual and text, as the paper has it); one number, or one per layer.

    Source: HoliTom, arXiv 2505.21334; DivPrune, arXiv 2503.02175; the form is FastV's.

    Example:
        >>> round(published_flops(28, 3584, 18944, 32 * 196) / 1e12, 1)  # LLaVA-OneVision-7B
        40.8
    """
    tokens = _per_layer("n", n, layers)
    return sum(4 * t * d * d + 2 * t * t * d + 2 * t * d * m for t in tokens)


def _chunks(length: int, side: int) -> list[int]:
    """`length` cut into pieces of `side`, the last one shorter."""
    return [min(side, length - start) for start in range(0, length, side)]


def _count(name: str, value: int) -> int:
    if value < 0:
        raise ValueError(f"{name} must be >= 0, got {value}.")
    return value


def _per_layer(name: str, lengths: PerLayer, layers: int) -> list[int]:
    values = [lengths] * layers if isinstance(lengths, int) else list(lengths)
    if len(values) != layers:
        raise ValueError(f"{name} needs one number per layer: {layers}, got {len(values)}.")
    for value in values:
        _count(name, value)
    return values
