"""QTSplus: the tokens that a question looks at, as many as it needs, in order.

Legend: P patches of one item, n of them kept, S tokens of the question, D channels, N tokens of the
item, K kept ones with special tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.nn.functional import rms_norm

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    with_special,
)
from foveate.methods._qtsplus_modules import QueryGate


def plain_relevance(x_BPD: torch.Tensor, question_BSD: torch.Tensor) -> torch.Tensor:
    """Relevance without trained projections: the most attention of any question token, [B, P].

    Both sides scaled to unit mean square, one head, logits over sqrt(D): a softmax of cosines times
    sqrt(D). O(B S P D).

    Args:
        x_BPD: patches.
        question_BSD: embeddings of the question.

    Example:
        >>> x = torch.eye(16)[None]
        >>> plain_relevance(x, x[:, 3:4]).argmax().item()
        3
    """
    q_BSD, k_BPD = (rms_norm(x.float(), x.shape[-1:], eps=1e-6) for x in (question_BSD, x_BPD))
    return ops.peak_attention(q_BSD[:, None], k_BPD[:, None])


@lru_cache(maxsize=2)
def _load(
    path: Path,
    changed: int,
    head_dim: int,
    rho: tuple[float, float],
    most: int,
    device: torch.device,
    dtype: torch.dtype,
) -> QueryGate:
    """The gate of a file; `changed` makes a rewritten file another one."""
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"qtsplus: {path} is no safetensors file: {error}") from error
    gate = QueryGate.from_tensors(tensors, head_dim, rho=rho, most=most)
    gate.requires_grad_(False).to(device)
    for layer in (*gate.scoring_layers, *gate.reencode_layers):
        layer.to(dtype)
    # Numbers, not features: bfloat16 would round the entropy of a long video to a few steps.
    gate.budget.float()
    return gate


@dataclass(frozen=True)
class QTSplus(Method):
    """QTSplus: the patches that the question looks at most, re-encoded among themselves.

    With `weights` it is the trained system: a scoring layer, a budget head that says how many
    tokens this question needs of this item (unless the call has a budget), and self-attention over
    what is kept. Without, relevance is attention of the question's embeddings to the patches as
    they are, and the budget says how many stay. O(S P D), with weights and O(P D^2).

    Args:
        weights: a safetensors file with tensors named as released; None: the training-free half.
        head_dim: channels of an attention head of the weights, 128 in Qwen2.5-VL.
        rho_min: least fraction that the budget head may keep.
        rho_max: largest one.
        n_max: tokens that it keeps at most.
        reencode: apply the re-encoding layers of the weights.
        time: add an embedding of the frame's number before that, as the paper describes and the
            released code does not; for weights trained so.

    Raises:
        ValueError: a number is out of range.

    Example:
        >>> QTSplus().count(Grid.video(16, 14, 14), Budget(retain=0.1))
        Count(tokens=314, exact=True)
        >>> QTSplus(weights="gate.safetensors").count(
        ...     Grid.video(16, 14, 14), Budget(retain=0.11, published=True)
        ... )
        Count(tokens=1568, exact=False)

    Source: arXiv 2511.11910.
    """

    weights: str | None = None
    head_dim: int = 128
    rho_min: float = 0.05
    rho_max: float = 0.5
    n_max: int = 2560
    reencode: bool = True
    time: bool = False

    card: ClassVar[Card] = Card(
        name="qtsplus",
        title="QTSplus",
        paper="Seeing the Forest and the Trees: Query-Aware Tokenizer for Long-Video Multimodal "
        "Language Models",
        arxiv="2511.11910",
        year=2025,
        url="https://github.com/Siyou-Li/QTSplus",
        licence="MIT",
        stages=("projector",),
        kind="trained",
        summary="Keeps the tokens that the question attends to most, as many as a small head "
        "predicts, and re-encodes them.",
        defaults={
            "library": "tau 0.1, n_max 2560, rho 0.05 to 0.5, 1 scoring and 1 re-encoding layer",
            "Qwen2.5-VL-3B and 7B, example run": "tau 0.5, n_max 512, 2 re-encoding layers",
        },
        headline=(
            "Up to 89 % fewer visual tokens and 28 % less end-to-end latency with Qwen2.5-VL at "
            "600 frames on one A100",
            "Qwen2.5-VL with it (without): VideoMME 57.07 (57.81), LVBench 37.90 (39.44), "
            "MLVU-test 27.37 (31.78), TempCompass direction 64.07 (43.58), order 69.54 (63.91)",
        ),
        notes=(
            "weights=PATH is the trained system. Without it there is no training: projections are "
            "identities, the budget says how many stay, and nothing is re-encoded. None of the "
            "published figures is to be expected of that.",
            "With weights and a budget of the call, the budget holds exactly and the budget head "
            "is not asked; without one, it decides, within rho_min, rho_max and n_max.",
            "The question is text.segment: the text behind the item, up to the next one, with "
            "what the chat template puts there. The released code embeds the question alone.",
            "Equal relevance goes to the first token; the released code leaves that open.",
            "A re-encoded token has the provenance of the one it was, though it has read the "
            "others; deepstack features are those of the selected tokens.",
            "Newlines of rows that still hold a patch, newlines at the end and [CLS] tokens stay, "
            "on top of the budget, and are neither scored nor re-encoded.",
            "The gate of its training finds its threshold with an exact gradient and samples at "
            "the intended rate; the released forms, of which the sampling keeps more than was "
            "asked for, are options. The trainer is no part of this.",
            "Samples of a batch are padded behind a mask; the released code repeats the last "
            "token instead, which changes what the re-encoder makes of the others.",
        ),
        retain=0.11,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ("text.segment",)

    def __post_init__(self) -> None:
        if not 0 < self.rho_min <= self.rho_max <= 1:
            raise ValueError(
                "rho_min and rho_max must be 0 < rho_min <= rho_max <= 1, got "
                f"{self.rho_min} and {self.rho_max}."
            )
        if self.n_max < 1 or self.head_dim < 1:
            raise ValueError(
                f"n_max and head_dim must be at least 1, got {self.n_max} and {self.head_dim}."
            )
        if self.time and self.weights is None:
            raise ValueError("time=True embeds times for the re-encoder of weights=PATH; give one.")

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Refuse weights that are not there, before a prompt is read."""
        if self.weights is not None and not Path(self.weights).expanduser().is_file():
            raise ValueError(f"qtsplus: there is no file weights={self.weights!r}.")

    # -- counting ahead -------------------------------------------------------------------------

    def count(self, grid: Grid, budget: Budget) -> Count:
        """The budget and special tokens; a bound where the budget head decides or rows end."""
        if budget.is_full:
            return Count(grid.num_tokens)
        P, rows = grid.num_patches, sum(p.height for p in grid.planes if p.row_newline)
        if self._decides(budget):
            keep = min(self.n_max, math.ceil(self.rho_max * P))
            return Count(keep + grid.num_special + min(rows, keep), exact=False)
        keep = max(1, budget.count(P))
        if keep == P:
            return Count(grid.num_tokens)
        return Count(keep + grid.num_special + min(rows, keep), exact=rows == 0)

    def _decides(self, budget: Budget) -> bool:
        """Whether the budget head says how many stay."""
        return self.weights is not None and budget.published

    # -- projector ------------------------------------------------------------------------------

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Score, choose and re-encode the patches of one item.

        Raises:
            ValueError: the weights are of another width, or cannot be read.
        """
        grid, budget = context.grid, context.budget
        if budget.is_full:
            return None
        patch_P = grid.patch_index(tokens.device)
        keep = max(1, budget.count(len(patch_P)))
        if keep == len(patch_P) and not self._decides(budget):
            return None
        question_1SD = context.signal("text.segment").to(tokens.x_BND.dtype)
        x_1PD = tokens.x_BND[:, patch_P]
        gate = self._gate(x_1PD)
        if gate is None:
            relevance_P = plain_relevance(x_1PD, question_1SD)[0]
        else:
            relevance_1P, rho_1, num_1 = gate.score(x_1PD, question_1SD)
            relevance_P = relevance_1P[0]
            if self._decides(budget):
                keep = int(gate.count(rho_1, num_1))
        context.note(
            "relevance", relevance_P, caption="most attention of any head and question token"
        )
        chosen_n = ops.top_k(relevance_P, keep)
        kept_K = with_special(patch_P[chosen_n], grid)
        if gate is None or not self.reencode or not len(gate.reencode_layers):
            return Reduction.select(kept_K, tokens.num_tokens)
        time_1n = grid.positions(tokens.device)[patch_P[chosen_n], 0][None] if self.time else None
        made_nD = gate.reencode(x_1PD[:, chosen_n], time_Bn=time_1n)[0]
        features_ND = tokens.x_BND[0].clone()
        features_ND[patch_P[chosen_n]] = made_nD
        return Reduction.synthesise(
            features_ND[kept_K][None],
            tokens.num_tokens,
            _one_hot(kept_K, tokens.num_tokens),
            kept_K[None],
        )

    def _gate(self, x_1PD: torch.Tensor) -> QueryGate | None:
        if self.weights is None:
            return None
        self.check(None, None)
        path = Path(self.weights).expanduser().resolve()
        rho = (self.rho_min, self.rho_max)
        changed = path.stat().st_mtime_ns
        gate = _load(path, changed, self.head_dim, rho, self.n_max, x_1PD.device, x_1PD.dtype)
        if gate.width != x_1PD.shape[2]:
            raise ValueError(
                f"The weights {self.weights} are for features of width {gate.width}; this model's "
                f"have {x_1PD.shape[2]}."
            )
        return gate


def _one_hot(index_K: torch.Tensor, num_in: int) -> torch.Tensor:
    """The matrix of a selection, sparse [1, K, N]."""
    K = len(index_K)
    row_K = torch.arange(K, device=index_K.device)
    index_3K = torch.stack([torch.zeros_like(row_K), row_K, index_K])
    ones_K = torch.ones(K, device=index_K.device)
    size = (1, K, num_in)
    return torch.sparse_coo_tensor(index_3K, ones_K, size, check_invariants=False).coalesce()
