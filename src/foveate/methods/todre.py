"""ToDRE: diverse visual tokens before the LLM, and none once its text no longer looks at them.

Legend: N tokens of one item or visual tokens of one sample, P patches of an item, K kept patches,
S tokens of a sample's sequence, D channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from foveate import ops
from foveate.core import (
    Card,
    DecoderContext,
    Grid,
    PatchSelector,
    ProjectorContext,
    Reduction,
    Tokens,
    relative_layer,
)

Objective = Literal["max_sum", "k_center"]


def diverse_order(
    x_ND: torch.Tensor, keep: int, pivot: int | torch.Tensor, objective: Objective = "max_sum"
) -> torch.Tensor:
    """The order in which tokens are chosen, starting with the pivot, int64 [keep]; O(keep N D).

    Example:
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.1], [0.0, 1.0]])
        >>> diverse_order(x, 3, 0).tolist(), diverse_order(x, 3, 0, "k_center").tolist()
        ([0, 2, 1], [0, 2, 3])

    Source: ToDRE, stage 1 (arXiv 2505.18757; "max_sum" of version 2, "k_center" of version 1).
    """
    if objective == "max_sum":
        return ops.max_sum_diversity(x_ND, keep, first=pivot)
    return ops.k_centre(x_ND, keep, first=pivot, metric="cosine")


def attention_share(attention_S: torch.Tensor, part_N: torch.Tensor) -> torch.Tensor:
    """Which share of the attention that some tokens spend goes to the tokens `part_N`, a scalar.

    Args:
        attention_S: sum or mean of their attention rows, over heads and rows.
        part_N: int64 [N].

    Example:
        >>> attention_share(torch.tensor([3.0, 0.5, 0.5]), torch.tensor([1, 2]))
        tensor(0.2500)
    """
    return attention_S[part_N].sum() / attention_S.sum()


@dataclass(frozen=True)
class ToDRE(PatchSelector):
    """ToDRE: a diverse subset of every item, all of which leaves late in the LLM if text lost it.

    Args:
        objective: "max_sum" of the paper's second version, or "k_center" of its first.
        tau: visual tokens leave when less than this share of the instruction's attention goes to
            them; 0 never lets them go.
        check_layer: the decoder layer whose attention is looked at: an index, or a fraction of the
            depth, rounded down.

    Raises:
        ValueError: an argument is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> ToDRE().count(Grid.video(5, 24, 24), Budget(retain=0.1)).tokens
        288
        >>> ToDRE().decoder_layers(32), ToDRE().attention_layers(32)
        ((29,), (28,))

    Source: arXiv 2505.18757.
    """

    objective: Objective = "max_sum"
    tau: float = 0.1
    check_layer: int | float = 7 / 8

    card: ClassVar[Card] = Card(
        name="todre",
        title="ToDRE",
        paper="ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance",
        arxiv="2505.18757",
        year=2025,
        stages=("projector", "decoder"),
        kind="training-free",
        summary="Keeps visual tokens that are unlike those kept before, and drops them all late in "
        "the LLM once the text hardly attends to them.",
        defaults={
            "LLaVA-NeXT (2,880 tokens)": "720 or 288 tokens (retain 0.25 or 0.1), max_sum, "
            "tau 0.10, layer 28 of 32",
            "video, Qwen2.5-VL-7B, InternVL2-8B": "retain 0.25 or 0.1",
        },
        headline=(
            "LLaVA-NeXT-7B, mean of 8 image sets relative to the full model: 98.2 % at retain "
            "0.25, 95.0 % at 0.1",
            "Four video sets, the same: 103.1 % at retain 0.25, 100.9 % at 0.1",
            "LLaVA-NeXT-7B on an RTX 3090 at retain 0.1: 6.0 instead of 31.4 TFLOPs, 2.9 instead "
            "of 1.5 samples per second",
        ),
        notes=(
            "There is no public code. The first version of the paper chooses by k-centre "
            '(objective="k_center"), the second by the sum of similarities, which may take '
            "near-duplicates on the far side of a crowd.",
            "The first token is the one with the most [CLS] attention in the block that makes the "
            "features (of an any-resolution image: in the thumbnail). Encoders without [CLS]: the "
            "one that receives the most attention; the paper takes a random one.",
            "One choice over all patches of an image with its tiles, or of a video; every item on "
            "its own. Newline tokens are no candidates: rows that still hold a patch keep theirs, "
            "on top of the budget.",
            "7/8 of the depth is rounded down, and one layer at least comes after the check.",
            "Text is what follows the last visual token, so visual tokens attend to none of it "
            "under a causal mask, and the text's attention alone decides. Without such text "
            "nothing is dropped.",
            "Text keeps its positions when visual tokens leave; each sample decides for itself.",
        ),
        retain=0.25,
    )
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = (
        ("encoder.cls_attention", "encoder.received_attention"),
    )

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise ValueError(f'objective must be "max_sum" or "k_center", got {self.objective!r}.')
        if not self.tau >= 0:
            raise ValueError(f"tau is a share of attention, at least 0, got {self.tau}.")

    # -- diversity ------------------------------------------------------------------------------

    def choose(
        self, tokens: Tokens, context: ProjectorContext, patch_P: torch.Tensor, keep: int
    ) -> torch.Tensor:
        """The pivot and what is unlike it; the order of choice is in `context.state`."""
        score_N = context.signal("encoder.cls_attention", "encoder.received_attention")[0]
        pivot = score_N[patch_P[: _num_candidates(context.grid)]].argmax()
        order_K = diverse_order(tokens.x_BND[0, patch_P], keep, pivot, self.objective)
        context.state["order"] = patch_P[order_K]
        context.note(
            "order of choice",
            range(keep),
            caption="each is most unlike those before it",
            at=patch_P[order_K],
        )
        context.note("pivot", True, "mark", "the most attended patch", at=patch_P[order_K[:1]])
        return order_K

    # -- relevance ------------------------------------------------------------------------------

    def layer(self, num_layers: int) -> int:
        """The layer whose attention is looked at.

        Raises:
            ValueError: it does not exist, or no layer comes after it.

        Example:
            >>> ToDRE().layer(32), ToDRE().layer(28), ToDRE().layer(4)
            (28, 24, 2)
        """
        if 0 < self.check_layer < 1:
            return min(int(self.check_layer * num_layers), num_layers - 2)
        layer = relative_layer(self.check_layer, num_layers, "check_layer")
        if layer == num_layers - 1:
            raise ValueError(f"check_layer = {layer} is the last layer: none is left to be saved.")
        return layer

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer after the one that is looked at."""
        return (self.layer(num_layers) + 1,) if num_layers > 1 else ()

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer that is looked at."""
        return (self.layer(num_layers),) if num_layers > 1 else ()

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Drop all visual tokens, or none; O(R S d) for R tokens of instruction."""
        N, num_text = tokens.num_tokens, len(context.after_R)
        if context.budget.is_full or N == 0 or num_text == 0:
            return None
        view = context.attention(context.layer - 1)
        # The instruction ends the sequence. Its counterpart, what visual tokens attend to in it,
        # is 0 under a causal mask and always below tau.
        attention_S = view.mean_of_last(num_text)[0]
        share = attention_share(attention_S, view.visual_N)
        context.state["text_to_visual"] = share
        context.note(
            "attention",
            lambda: attention_S[context.survivors(context.layer - 1)[context.visual_N]],
            caption="of the instruction, in the layer before",
        )
        if not bool(share < self.tau):
            return None
        return Reduction.select(torch.empty(0, dtype=torch.long, device=tokens.device), N)


def _num_candidates(grid: Grid) -> int:
    """How many patches may be the pivot: of an image in tiles those of its thumbnail, else all."""
    return grid.planes[0].num_patches if grid.modality == "image" else grid.num_patches
