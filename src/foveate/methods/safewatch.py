"""SafeWatch: policies encoded side by side, and visual keys kept for the policies that read them.

Legend: S tokens of one sample, N visual tokens, M policies, H heads, R rows of one policy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch

from foveate import ops
from foveate.core import (
    AttentionRule,
    CacheContext,
    Card,
    Method,
    Reduction,
    RuleContext,
    relative_layer,
)

Span = tuple[int, int]


@dataclass(frozen=True)
class SafeWatch(Method):
    """SafeWatch: parallel equivalent policy encoding, and policy-aware pruning of the cache.

    The prompt is [system][visual tokens][policy 1]...[policy M][query]. At the decoder, policies
    are blind to one another and start at the same position id, so that their order cannot matter;
    the query follows the longest of them. At the cache, behind the prefill, every policy ranks the
    visual tokens by the attention it pays them, and what no policy ranks high leaves all layers.
    "safewatch@decoder" and "safewatch@cache" are the two halves.

    Args:
        policies: where the policies stand: (first token, last + 1) of each, one behind the other
            without gap, counted in the prompt before any reduction and without padding; negative
            numbers count from its end. Either one such tuple for all samples, or one per sample.
            `policy_spans` finds them.
        allocation: "equal" gives every policy the same number of tokens, "adaptive" shares them
            in proportion to the attention that its rows pay to visual tokens.
        layers: whose attention ranks: indices or fractions of the depth; None: all.

    Raises:
        ValueError: spans overlap, leave gaps or are empty; `allocation` is none of the two.

    Example:
        >>> prompt = policy_prompt(["No red object.", "No sign."], "Is the video safe?")
        >>> print(prompt)
        No red object.
        No sign.
        Is the video safe?
        >>> SafeWatch(policies=((-12, -8), (-8, -5))).spans(100)
        [(88, 92), (92, 95)]

    Source: arXiv 2412.06878, sections on parallel equivalent policy encoding and policy-aware
    adaptive pruning.
    """

    policies: tuple[Any, ...] = ()
    allocation: Literal["equal", "adaptive"] = "equal"
    layers: tuple[int | float, ...] | None = None

    one_cache_choice: ClassVar[bool] = True
    card: ClassVar[Card] = Card(
        name="safewatch",
        title="SafeWatch",
        paper="SafeWatch: An Efficient Safety-Policy Following Video Guardrail Model with "
        "Transparent Explanations",
        arxiv="2412.06878",
        year=2024,
        url="https://github.com/BillChan226/SafeWatch",
        licence="MIT",
        stages=("decoder", "cache"),
        kind="trained",
        summary="Encodes policies in parallel and keeps the visual keys that some policy reads.",
        defaults={"InternVL2-8B": "retain 0.1, one frame per event"},
        headline=(
            "Pruning 90 % of the video tokens costs less than 1 % (abstract); prefill hardly "
            "changes, decoding does",
        ),
        notes=(
            "Used without training; the published model was tuned for both halves. Neither of them "
            "is in the released code: what follows is ours where the paper does not say.",
            "The query starts behind the longest policy. Relevance is the mean over rows, heads "
            "and all layers, renormalised over the visual tokens of each policy.",
            "The sets of the policies are united; should they exceed the budget, first choices of "
            "all policies go first, then second choices, and so on. Sets that overlap leave fewer "
            "tokens than the budget.",
            "The parallel encoding is a mask: it changes what is computed and not yet how much. "
            "Batching the policies as separate short prefills gives the same numbers.",
            "Choosing frames by event is left to the frames stage.",
        ),
        positions="original",
        retain=0.2,
    )

    def __post_init__(self) -> None:
        if self.allocation not in ("equal", "adaptive"):
            raise ValueError(f'allocation must be "equal" or "adaptive", got {self.allocation!r}.')
        for spans in self._per_sample():
            if not all(_is_span(span) for span in spans):
                raise ValueError(
                    "policies holds (first token, last + 1) of each policy, or one tuple of those "
                    f"per sample, got {self.policies!r}."
                )
            gaps = any(one[1] != other[0] for one, other in pairwise(spans))
            if gaps or any(first >= end for first, end in spans):
                raise ValueError(
                    "Policies follow one another without gap or overlap, and none is empty; got "
                    f"the spans {spans!r}. Let each end where the next begins."
                )

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when no policy is named or a layer does not exist."""
        super().check(num_encoder_layers, num_layers)
        if not self.policies:
            raise ValueError(
                "safewatch needs to know where the policies are: policies=((first, end), ...), "
                "which foveate.methods.safewatch.policy_spans finds in the token ids."
            )
        if num_layers is not None:
            self.attention_layers(num_layers)

    def attention_layers(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose attention ranks visual tokens."""
        if self.layers is None:
            return tuple(range(num_layers))
        return tuple(sorted({relative_layer(layer, num_layers, "layers") for layer in self.layers}))

    def spans(self, num_tokens: int, sample: int = 0) -> list[Span]:
        """The policies of one sample as places in its prompt of `num_tokens`.

        Raises:
            ValueError: they lie outside of the prompt, or the sample has none.
        """
        every = self._per_sample()
        if len(every) > 1 and sample >= len(every):
            raise ValueError(f"policies names {len(every)} samples; there is no sample {sample}.")
        spans = every[sample if len(every) > 1 else 0]
        found = [tuple(n + num_tokens if n < 0 else n for n in span) for span in spans]
        if spans and spans[-1][1] == 0:
            found[-1] = (found[-1][0], num_tokens)
        if any(not 0 <= first < end <= num_tokens for first, end in found):
            raise ValueError(
                f"The policies {spans!r} do not lie in the prompt of sample {sample}, which has "
                f"{num_tokens} tokens."
            )
        return [(first, end) for first, end in found]

    # -- parallel equivalent policy encoding ----------------------------------------------------

    def attention_rule(self, context: RuleContext) -> AttentionRule | None:
        """Policies see what comes before the first of them and themselves, from one position on.

        O(S^2) for the mask.
        """
        spans = self.spans(context.num_columns, context.sample)
        if len(spans) < 2:
            return None  # one policy is an ordinary prompt
        column_S, position_S = context.column_S, context.position_PS[0]
        chunk_S = torch.zeros_like(column_S)
        for number, (first, end) in enumerate(spans, start=1):
            chunk_S[(column_S >= first) & (column_S < end)] = number
        if bool((chunk_S[context.visual_N] > 0).any()):
            raise ValueError(f"The policies {spans!r} hold visual tokens; they are text behind it.")
        place_S = torch.arange(context.num_tokens, device=column_S.device)
        visible_SS = place_S[:, None] >= place_S
        in_both_SS = (chunk_S[:, None] > 0) & (chunk_S > 0)
        visible_SS &= ~in_both_SS | (chunk_S[:, None] == chunk_S)
        starts = torch.stack([position_S[chunk_S == n][0] for n in range(1, len(spans) + 1)])
        lengths = (chunk_S[:, None] == torch.arange(1, len(spans) + 1, device=starts.device)).sum(0)
        # Chunks start where the first does, the query behind the longest chunk.
        moved_M = starts - starts[0]
        moved_Q = moved_M[-1] + lengths[-1] - lengths.max()
        shift_S = torch.zeros_like(position_S)
        shift_S[chunk_S > 0] = moved_M[chunk_S[chunk_S > 0] - 1]
        shift_S[column_S >= spans[-1][1]] = moved_Q
        return AttentionRule(visible_SS=visible_SS, shift_S=shift_S)

    # -- policy-aware pruning -------------------------------------------------------------------

    def cache(
        self, keys_BGNd: torch.Tensor, values_BGNd: torch.Tensor, context: CacheContext
    ) -> Reduction | None:
        """Gather relevance layer by layer; behind the last layer, name the tokens that stay."""
        N = keys_BGNd.shape[2]
        if context.budget.is_full or N == 0:
            return None
        keep = max(1, context.budget.count(N))
        if context.layer in self.attention_layers(context.num_layers):
            self._gather(context)
        if context.layer < context.num_layers - 1 or keep >= N:
            return None
        known_N, weight_MN = context.state["known"], context.state["weights"]
        # Tokens that left at an earlier layer are ranked no more.
        weight_MN = weight_MN[:, torch.searchsorted(known_N, context.id_N)]
        context.note("relevance", lambda: weight_MN.sum(0), caption="attention of all policies")
        context.note("policy", lambda: weight_MN.argmax(0), "label", "that attends most")
        return Reduction.select(policy_tokens(weight_MN, keep, self.allocation), N)

    def _gather(self, context: CacheContext) -> None:
        """Add this layer's attention from every policy to every visual token, [M, N].

        O(M R (N + S) H d) for policies of R rows.
        """
        view, column_S, visual_N = context.attention(), context.column_S, context.visual_N
        sums = []
        for first, end in self.spans(context.num_columns, context.sample):
            rows_R = ((column_S >= first) & (column_S < end)).nonzero()[:, 0]
            sums.append(view.rows(rows_R)[0][..., visual_N].mean(dim=(0, 1)))
        weight_MN, id_N = torch.stack(sums), context.id_N
        if "weights" not in context.state:
            context.state.update(known=id_N, weights=weight_MN)
            return
        place_N = torch.searchsorted(context.state["known"], id_N)
        context.state["weights"][:, place_N] += weight_MN

    def _per_sample(self) -> tuple[tuple[Any, ...], ...]:
        """Spans per sample; one entry where they hold for all."""
        nested = (
            self.policies
            and isinstance(self.policies[0], Sequence)
            and (not self.policies[0] or isinstance(self.policies[0][0], Sequence))
        )
        return self.policies if nested else (self.policies,)


def policy_tokens(
    weight_MN: torch.Tensor, budget: int, allocation: Literal["equal", "adaptive"] = "equal"
) -> torch.Tensor:
    """Which visual tokens some policy wants, ascending int64 [K], K <= budget. O(M N log N).

    Args:
        weight_MN: attention of each policy to each token, before renormalisation (which changes
            no ranking); its sums are the relevance of the policies.
        budget: most tokens kept of the N, at least 1.
        allocation: "equal" or "adaptive" shares among the M policies.

    Example:
        >>> policy_tokens(torch.tensor([[0.5, 0.1, 0.2, 0.1], [0.1, 0.1, 0.2, 0.6]]), 2).tolist()
        [0, 3]
    """
    M, N = weight_MN.shape
    order_MN = weight_MN.argsort(dim=1, descending=True, stable=True)
    rank_MN = torch.empty_like(order_MN)
    rank_MN.scatter_(1, order_MN, torch.arange(N, device=order_MN.device).expand(M, N))
    if allocation == "equal":
        share_M = torch.full((M, 1), math.ceil(budget / M), device=weight_MN.device)
    else:
        total_M = weight_MN.sum(1).double().cpu().clamp_min(1e-30)
        wanted = ops.proportional(max(budget, M), total_M.tolist(), minimum=[1] * M)
        share_M = torch.tensor(wanted, device=weight_MN.device)[:, None]
    # First choices of all policies, then their second choices, and so on.
    turn_MN = rank_MN * M + torch.arange(M, device=weight_MN.device)[:, None]
    turn_N = turn_MN.masked_fill(rank_MN >= share_M, M * N).amin(0)
    kept_N = turn_N.argsort(stable=True)[:budget]
    return kept_N[turn_N[kept_N] < M * N].sort().values


def policy_prompt(policies: Iterable[str], query: str) -> str:
    """The text of a prompt: one policy a line, then the query; the visual tokens come before it.

    Example:
        >>> policy_prompt(["No weapons."], "Is this allowed?").splitlines()
        ['No weapons.', 'Is this allowed?']
    """
    return "\n".join([*(" ".join(policy.split()) for policy in policies), query])


def policy_spans(
    tokenizer: Any, input_ids: Sequence[int] | torch.Tensor, policies: Sequence[str]
) -> tuple[Span, ...]:
    """Where policies stand in the token ids of one sample, as `SafeWatch.policies` wants it.

    The tokens are read back one by one and compared without white space, so that it does not
    matter how words were split. Each policy ends where the next begins.

    Args:
        tokenizer: a transformers tokenizer, or anything with `decode([id])`.
        input_ids: ids of the sample without padding, visual placeholders expanded.
        policies: the texts, in the order of the prompt.

    Raises:
        ValueError: a policy is not in the prompt, or not in that order.

    Example:
        >>> class Words:
        ...     words = ["<video>", "no", "red", "sign", "?"]
        ...     def decode(self, ids):
        ...         return self.words[ids[0]]
        >>> policy_spans(Words(), [0, 0, 0, 1, 2, 1, 3, 4], ["no red", "no sign"])
        ((3, 5), (5, 7))
    """
    ids = input_ids.tolist() if isinstance(input_ids, torch.Tensor) else list(input_ids)
    pieces = {token: "".join(tokenizer.decode([token]).split()) for token in set(ids)}
    text, owner = "", []
    for place, token in enumerate(ids):
        text += pieces[token]
        owner += [place] * len(pieces[token])
    found: list[Span] = []
    # From the end: the same words may stand in the system prompt as well.
    end = len(text)
    for policy in reversed(policies):
        wanted = "".join(policy.split())
        start = text.rfind(wanted, 0, end) if wanted else -1
        if start < 0:
            raise ValueError(
                f"The policy {policy!r} does not stand in these tokens (or not in this order). "
                "Give the spans of tokens yourself if the tokenizer changes the text."
            )
        found.append((owner[start], owner[start + len(wanted) - 1] + 1))
        end = start
    found.reverse()
    joined = [(one[0], other[0]) for one, other in pairwise(found)]
    return (*joined, *found[-1:])


def _is_span(span: Any) -> bool:
    return (
        isinstance(span, Sequence)
        and len(span) == 2
        and all(isinstance(n, int) and not isinstance(n, bool) for n in span)
    )
