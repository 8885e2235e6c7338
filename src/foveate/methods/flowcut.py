"""FlowCut: cut a little between encoder blocks, by the information that flows through each token.

Legend: B images of a call, M tokens present (prefix included), P patches of an image, U units that
are cut as a whole (patches, or groups of them that the model merges), I images of one item,
N visual tokens of an item or sample, H heads, G key heads, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn.functional import pad

from foveate import ops
from foveate.core import (
    Budget,
    Card,
    Count,
    DecoderContext,
    EncoderAttentionView,
    EncoderContext,
    Grid,
    Method,
    ProjectorContext,
    Reduction,
    Tokens,
    relative_layer,
    with_special,
)
from foveate.core.units import (
    best_units,
    image_shape,
    is_tiled,
    num_tiles,
    patch_groups,
    per_unit,
    present_units,
    select_tokens,
)

#: Added inside the logarithm of the entropy where there is no [CLS] token.
_EPS = 1e-7
#: What every survivor scores at least: zero is for patches that were cut.
_LEAST = 1e-20


def encoder_flow(
    q_BHMd: torch.Tensor,
    k_BHMd: torch.Tensor,
    v_BHMd: torch.Tensor,
    num_prefix: int,
    has_cls: bool,
    exists_BM: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention to every patch in one encoder block, and its information flow, float32 [B, P] each.

    With [CLS]: its attention, and that of its value to the patches' values, the latter without any
    scale. Without: attention of the mean query, no semantic term. O(B H M d).

    Args:
        q_BHMd: queries of the block's attention, prefix tokens first.
        k_BHMd: keys likewise.
        v_BHMd: values likewise.
        num_prefix: tokens in front of the patches.
        has_cls: the first of them is a [CLS] token.
        exists_BM: which tokens are no padding; None: all.

    Example:
        >>> q, k, v = torch.randn(3, 2, 3, 10, 8)
        >>> attention, flow = encoder_flow(q, k, v, num_prefix=1, has_cls=True)
        >>> tuple(attention.shape), tuple(flow.shape)
        ((2, 9), (2, 9))
    """
    semantic_BP = None
    if has_cls:
        query_BH1d = q_BHMd[:, :, :1]
        rows_BH1M = ops.attention_rows(v_BHMd[:, :, :1], v_BHMd, scale=1.0, key_mask=exists_BM)
        semantic_BP = rows_BH1M.mean(1)[:, 0, num_prefix:]
    elif exists_BM is None:
        query_BH1d = q_BHMd.float().mean(2, keepdim=True)
    else:
        weight_BM = exists_BM / exists_BM.sum(1, keepdim=True)
        query_BH1d = torch.einsum("bhmd,bm->bhd", q_BHMd.float(), weight_BM)[:, :, None]
    rows_BH1M = ops.attention_rows(query_BH1d, k_BHMd, key_mask=exists_BM)
    attention_BP = rows_BH1M.mean(1)[:, 0, num_prefix:]
    return attention_BP, ops.flow_score(attention_BP, semantic_BP, v_BHMd[:, :, num_prefix:])


def prompt_flow(
    q_HTd: torch.Tensor,
    k_GNd: torch.Tensor,
    value_GTd: torch.Tensor,
    v_GNd: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Information flow of visual tokens to the last one of the prompt in an LLM layer, [N].

    Both terms are softmaxes over the visual tokens only, both scaled. O(H N d).

    Args:
        q_HTd: rotated query of the last token, T = 1.
        k_GNd: rotated keys of the visual tokens.
        value_GTd: value of the last token.
        v_GNd: values of the visual tokens.
        scale: softmax scale.

    Example:
        >>> q, k, own, v = (torch.randn(2, n, 4) for n in (1, 6, 1, 6))
        >>> prompt_flow(q, k, own, v, 0.5).shape
        torch.Size([6])
    """
    relevance_1N = ops.attention_rows(q_HTd[None], k_GNd[None], scale=scale).mean(1)[:, 0]
    semantic_1N = ops.attention_rows(value_GTd[None], v_GNd[None], scale=scale).mean(1)[:, 0]
    return ops.flow_score(relevance_1N, semantic_1N, v_GNd[None])[0]


@dataclass(frozen=True)
class FlowCut(Method):
    """FlowCut: progressive cuts between encoder blocks, and one inside the language model.

    `retain` is the share T / N of an item's tokens that the language model has after its own cut;
    without that cut it gets T tokens. With it, what enters is more: T / 2 of every tile of an
    any-resolution image, 2 T elsewhere. Frames of a video keep T / frames each.

    Where the model merges neighbouring patches into tokens, whole groups are cut. On encoders that
    pack their images (Qwen-VL, VideoLLaMA 3), and with "flowcut@projector", the encoder runs on all
    patches and the score of its last four blocks decides behind it.

    Args:
        llm_cut: cut inside the language model. None: where it was published, which is tiled images,
            encoders without [CLS], and models that merge patches.
        layer: language model layer after which that happens: an index, or a fraction of the depth.
        momentum: weight of earlier blocks in the cumulative score.
        every: cut in one of so many encoder blocks.
        batch_max: every image loses as many tokens as the one that loses most, as in the released
            code; results then depend on what else is in the batch.

    Raises:
        ValueError: a value is out of range.

    Example:
        >>> from foveate.core import Budget, Grid
        >>> FlowCut(llm_cut=False).count(Grid.image(24, 24), Budget(tokens=64))
        Count(tokens=64, exact=True)
        >>> FlowCut().count(Grid.image(24, 24), Budget(tokens=64))
        Count(tokens=128, exact=False)

    Source: arXiv 2505.19536; details from the released code.
    """

    llm_cut: bool | None = None
    layer: int | float = 1
    momentum: float = 0.5
    every: int = 2
    batch_max: bool = False

    card: ClassVar[Card] = Card(
        name="flowcut",
        title="FlowCut",
        paper="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language "
        "Models",
        arxiv="2505.19536",
        year=2025,
        url="https://github.com/TungChintao/FlowCut",
        licence="Apache-2.0",
        stages=("encoder", "projector", "decoder"),
        kind="training-free",
        summary="Cuts a few patches after every second encoder block, by [CLS] attention, likeness "
        "to [CLS] and size of values, summed up over the blocks.",
        defaults={
            "LLaVA-1.5 (576 patches)": "192, 128 or 64 tokens, no cut in the language model",
            "LLaVA-NeXT (5 tiles of 576)": "160 tokens (80 per tile before the language model); "
            "320 and 640 by analogy",
            "Qwen2-VL": "retain 0.333, 0.222 or 0.111 (twice that before the language model)",
        },
        headline=(
            "LLaVA-1.5-7B at 88.9 % fewer tokens: 1.6 % above the best method before; "
            "LLaVA-NeXT-7B at 94.4 % fewer: 4.3 %; prefill 3.2 times faster (abstract)",
            "Qwen2-VL-7B, mean of 7 sets relative to the full model: 98.7 % at retain 0.333, "
            "96.5 % at 0.222, 91.3 % at 0.111",
        ),
        notes=(
            "Images of a batch are cut one by one and padded inside the encoder; the released code "
            "cuts all by the largest number, which batch_max=True does.",
            "On Qwen2-VL the released code cuts single patches, merges any four survivors in a row "
            "and gives them the first position ids. Here 2 x 2 groups are scored and keep theirs.",
            "Its encoder packs all images into one row, which encoder-stage methods do not cut: "
            "there the cumulative score of the last four blocks (15/16 of it) picks 2 T groups "
            "behind the encoder, and the encoder saves nothing. Windows are not looked at.",
            "Ours: InternVL and LLaVA-NeXT-Video merge patches and have [CLS]; they take both "
            "cuts, as models without [CLS] do. Video settings are not published: T / frames per "
            "frame.",
            "Newline tokens that close rows go, as in the released code; [CLS] tokens and those "
            "at the end of an item stay on top of the budget. Inside the language model all "
            "compete.",
            "Where pooling windows overlap or a mosaic is scaled down, a token's score is that of "
            "its patches, pooled like the features; a patch that was cut is as it left.",
        ),
        retain=128 / 576,
    )
    renumbers: ClassVar[bool] = True
    reads_values: ClassVar[bool] = True
    encoder_drops: ClassVar[bool] = True
    encoder_optional: ClassVar[bool] = True
    encoder_point: ClassVar = "block_end"

    def __post_init__(self) -> None:
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), got {self.momentum}.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a whole number of blocks >= 1, got {self.every!r}.")
        if self.layer < 0:
            raise ValueError(f"layer must be at least 0, got {self.layer}.")

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when there are too few encoder blocks or LLM layers to cut between."""
        if num_encoder_layers is not None and num_encoder_layers < 2:
            raise ValueError(
                f"flowcut cuts between encoder blocks and needs two, got {num_encoder_layers}."
            )
        super().check(num_encoder_layers, num_layers)

    # -- how many -------------------------------------------------------------------------------

    def takes_two_cuts(self, grid: Grid, has_cls: bool, num_patches: int) -> bool:
        """Whether an item is cut inside the language model, too.

        Args:
            grid: its layout.
            has_cls: the encoder has a [CLS] token.
            num_patches: patches of one of its images; more than tokens where the model merges them.
        """
        if self.llm_cut is not None:
            return self.llm_cut
        merges = image_shape(grid, 0).num_patches != num_patches
        return is_tiled(grid) or merges or not has_cls

    def entering(self, grid: Grid, budget: Budget, two_cuts: bool) -> list[int]:
        """Patches of every plane of an item that enter the language model, at most.

        Example:
            >>> from foveate.core import Plane
            >>> image = Grid((Plane(24, 24), Plane(48, 48, row_newline=True)))
            >>> FlowCut().entering(image, Budget(tokens=160), True)
            [80, 320]
        """
        sizes = [plane.num_patches for plane in grid.planes]
        if two_cuts and is_tiled(grid):
            half = max(1, self.leaving(grid, budget) // 2)
            kept = [half * num_tiles(plane, grid) for plane in grid.planes]
        else:
            kept = [k * (2 if two_cuts else 1) for k in budget.split(sizes)]
        return [min(size, k) for size, k in zip(sizes, kept, strict=True)]

    def leaving(self, grid: Grid, budget: Budget) -> int:
        """T: tokens of an item that are left in the end."""
        if is_tiled(grid):
            return max(1, budget.count(grid.num_patches))
        return sum(budget.split([plane.num_patches for plane in grid.planes]))

    def count(self, grid: Grid, budget: Budget) -> Count:
        """What enters the language model; a bound, since the grid does not tell the encoder.

        Exact with `llm_cut` given, except for mosaics, whose padded margin goes.
        """
        if budget.is_full:
            return Count(grid.num_tokens)
        kept = sum(self.entering(grid, budget, self.llm_cut is not False))
        exact = self.llm_cut is not None and not is_tiled(grid)
        if kept == grid.num_patches:
            return Count(grid.num_tokens, exact)
        return Count(kept + grid.num_special, exact)

    # -- encoder --------------------------------------------------------------------------------

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Score the patches of all images after one block, and cut after every second one."""
        q, k, v = context.queries_BHNd, context.keys_BHNd, context.values_BHNd
        if q is None or k is None or v is None:
            raise ValueError(
                "flowcut reads queries, keys and values of the block that has just run; another "
                "method has changed the sequence inside it."
            )
        state, prefix = context.state, context.num_prefix
        if "score" not in state:
            state.update(self._begin(tokens, context))
        to_present = tokens.reduction
        unit_BP, num_units = present_units(tokens, state["group"], prefix)
        exists_BU = torch.zeros(tokens.batch, num_units + 1, dtype=torch.bool, device=tokens.device)
        exists_BU = exists_BU.scatter_(1, unit_BP, True)[:, :num_units]
        num_B, target_B = exists_BU.sum(1), state["target"]
        active_B1 = (num_B > target_B)[:, None] | state["always"]
        reduction = None
        if bool(active_B1.any()):
            attention_BP, flow_BP = encoder_flow(q, k, v, prefix, context.has_cls, tokens.mask_BN)
            before_BM = state["score"]
            if to_present is not None:
                before_BM = to_present.gather(before_BM)
            flow_BM = pad(flow_BP.clamp_min(_LEAST), (prefix, 0))
            if context.layer > 0:
                flow_BM = self.momentum * before_BM + (1 - self.momentum) * flow_BM
            score_BM = flow_BM.where(active_B1, before_BM)
            context.note("cumulative flow", lambda: _without(score_BM, prefix))
            remaining = context.num_layers - context.layer - (2 if context.has_cls else 1)
            if remaining >= 0 and remaining % self.every == 0:
                share_BU = per_unit(attention_BP, unit_BP, num_units, ops.scatter_sum)
                drop_B = self._num_dropped(share_BU, num_B, target_B, remaining, context.has_cls)
                score_BU = per_unit(score_BM[:, prefix:], unit_BP, num_units, ops.scatter_mean)
                keep_BM = best_units(score_BU, exists_BU, num_B - drop_B, unit_BP, prefix)
                context.note("survivors", keep_BM, "mark")
                score_BM = score_BM.where(keep_BM, 0.0)
                reduction = select_tokens(keep_BM)
            state["score"] = score_BM if to_present is None else to_present.restore(score_BM)
        if context.layer == context.num_layers - 1:
            context.carry("score", state["score"][:, prefix:])
            context.carry(
                "two cuts", state["two_cuts"][:, None].expand_as(state["score"])[:, prefix:]
            )
        return reduction

    def _begin(self, tokens: Tokens, context: EncoderContext) -> dict[str, torch.Tensor | None]:
        """What every image is to keep, in which units, and the score of patches nobody cuts."""
        B, P, device = tokens.batch, tokens.num_tokens - context.num_prefix, tokens.device
        targets, flags, groups = [], [], []
        for grid, plane in context.layouts() or ():
            two_cuts = context.acts("decoder")
            two_cuts = two_cuts and self.takes_two_cuts(grid, context.has_cls, P)
            kept, shape = self.entering(grid, context.budget, two_cuts)[plane], grid.planes[plane]
            # All tiles of a mosaic share its plane.
            targets.append(-(-kept // (num_tiles(shape, grid) if is_tiled(grid) else 1)))
            flags.append(float(two_cuts))
            groups.append(patch_groups(P, image_shape(grid, plane)))
        targets = targets or [max(1, context.budget.count(P))] * B
        group_BP = None
        if any(group is not None for group in groups):
            own_P = torch.arange(P)
            group_BP = torch.stack([own_P if g is None else g for g in groups]).to(device)
        return {
            "score": torch.ones(B, tokens.num_tokens, device=device),
            "target": torch.tensor(targets, device=device),
            "two_cuts": torch.tensor(flags or [0.0] * B, device=device),
            "group": group_BP,
            # Without a layout the projector stage may have to choose where nothing was cut.
            "always": torch.tensor(not flags and context.acts("projector"), device=device),
        }

    def _num_dropped(
        self,
        share_BU: torch.Tensor,
        num_B: torch.Tensor,
        target_B: torch.Tensor,
        remaining: int,
        has_cls: bool,
    ) -> torch.Tensor:
        """How many units every image loses now, int64 [B]."""
        eps = 0.0 if has_cls else _EPS
        if has_cls:
            share_BU = share_BU / share_BU.sum(1, keepdim=True).clamp_min(_LEAST)
        focus_B = ops.concentration(share_BU, num_B, eps)
        drop_B = ops.cut_towards(num_B, target_B, remaining, focus_B)
        if self.batch_max:
            drop_B = drop_B.max().expand_as(drop_B)
        return torch.minimum(drop_B, (num_B - target_B).clamp_min(0))

    # -- between encoder and language model -----------------------------------------------------

    def encoder_layers(self, num_layers: int, feature_layer: int) -> tuple[int, ...]:
        """The last four blocks, for encoders that are not shortened."""
        return tuple(range(max(0, feature_layer - 3), feature_layer + 1))

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Keep the tokens whose patches survived, or those of the best score in every plane."""
        grid, device = context.grid, tokens.device
        if context.budget.is_full:
            return None
        score_N, two_cuts = self._carried_score(context)
        chosen, first = [], 0
        patch_N = grid.patch_index(device)
        for plane, keep in zip(
            grid.planes, self.entering(grid, context.budget, two_cuts), strict=True
        ):
            patch_L = patch_N[first : first + plane.num_patches]
            score_L = score_N[patch_L]
            first += plane.num_patches
            chosen.append(patch_L[ops.top_k(score_L, min(keep, int((score_L > 0).sum())))])
        kept_K = torch.cat(chosen)
        left, share = tokens.num_tokens, 1.0
        if len(kept_K) < grid.num_patches:
            kept_K = with_special(kept_K, grid, "end")
            left = len(kept_K)
        if two_cuts:
            share = min(1.0, self.leaving(grid, context.budget) / left)
        share_1 = torch.full((1,), share, dtype=torch.float64, device=device)
        context.carry("share", share_1.expand(tokens.num_tokens))
        return None if left == tokens.num_tokens else Reduction.select(kept_K, tokens.num_tokens)

    def _carried_score(self, context: ProjectorContext) -> tuple[torch.Tensor, bool]:
        """The score per token, [N], and whether the language model cuts again."""
        score_N = context.read_carried("score")
        if score_N is not None:
            flag_N = context.carried_from_encoder("two cuts")
            return score_N, bool(flag_N.nan_to_num().max() > 0.5)
        views = context.encoder_attentions()
        score_IP = None
        for view in views:
            flow_IP = _all_patches(view, _view_flow(view))
            if score_IP is not None:
                flow_IP = self.momentum * score_IP + (1 - self.momentum) * flow_IP
            score_IP = flow_IP
        assert score_IP is not None
        two_cuts = context.acts("decoder")
        two_cuts = two_cuts and self.takes_two_cuts(
            context.grid, views[0].has_cls, views[0].num_patches
        )
        return views[0].to_tokens(score_IP.clamp_min(_LEAST))[0], two_cuts

    # -- inside it ------------------------------------------------------------------------------

    def decoder_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer before which the cut is made, if there may be one.

        Raises:
            ValueError: there is none behind `layer`.
        """
        if self.llm_cut is False:
            return ()
        layer = relative_layer(self.layer, num_layers)
        if layer + 1 == num_layers:
            raise ValueError(
                f"layer = {self.layer}: tokens are cut after it, and it is the last of "
                f"{num_layers}; give an earlier one, or llm_cut=False."
            )
        return (layer + 1,)

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layer whose last query, keys and values score the tokens."""
        return tuple(layer - 1 for layer in self.decoder_layers(num_layers))

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Keep the T visual tokens of a sample with the most flow to the end of the prompt."""
        N = tokens.num_tokens
        if context.budget.is_full or N == 0:
            return None
        if context.acts("projector"):
            keep = max(1, round(float(context.carried("share").sum())))
        else:
            keep = max(1, context.budget.count(context.num_visual))
        if keep >= N:
            return None
        view = context.attention(context.layer - 1)
        assert view.v_BGTd is not None
        seen_N = context.survivors(context.layer - 1)[context.visual_N]
        column_N = seen_N.clamp_min(0) + view.num_past
        score_N = prompt_flow(
            view.queries(torch.tensor([view.num_queries - 1]))[0],
            view.k_BGTd[0, :, column_N],
            view.v_BGTd[0, :, -1:],
            view.v_BGTd[0, :, column_N],
            view.scale,
        ).masked_fill(seen_N < 0, 0.0)
        context.note("flow to the last token", score_N)
        return Reduction.select(ops.top_k(score_N, keep), N)


def _view_flow(view: EncoderAttentionView) -> torch.Tensor:
    exists_IM = None if view.size_IM is None else view.size_IM > 0
    return encoder_flow(
        view.q_IHMd, view.k_IHMd, view.values(), view.num_prefix, view.has_cls, exists_IM
    )[1]


def _all_patches(view: EncoderAttentionView, value_IP: torch.Tensor) -> torch.Tensor:
    """Values of the patches present in a block, for all patches; zero where one was dropped."""
    if view.reduction is None:
        return value_IP
    return view.reduction.restore(pad(value_IP, (view.num_prefix, 0)))[:, view.num_prefix :]


def _without(score_BM: torch.Tensor, prefix: int) -> torch.Tensor:
    """The same with nothing to draw for the tokens in front."""
    return pad(score_BM[:, prefix:], (prefix, 0), value=torch.nan)
