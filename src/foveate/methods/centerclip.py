"""CenterCLIP: cluster the patches of consecutive frames together, and go on with the medoids.

Legend: R segments (rows of joined frames), f frames of one, n patches of a segment, N its tokens
(prefix included), K clusters, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, get_args

import torch
from torch.nn.functional import normalize

from foveate import ops
from foveate.core import Budget, Card, EncoderContext, Method, Reduction, Tokens, blocks_run

Algorithm = Literal["k_medoids", "spectral", "random", "uniform"]
Aggregate = Literal["medoid", "mean"]


@dataclass(frozen=True)
class CenterCLIP(Method):
    """CenterCLIP: before one block, the frames of a segment become one sequence of a few medoids.

    The patches of all its frames are clustered; each cluster goes on as its medoid, and the [CLS]
    tokens as their mean, so later blocks attend across the frames of a segment. The budget says how
    many clusters: retain = 1/3 are the published 49 of 3 x 49 patches.

    Args:
        after: blocks that have run before the clustering: a number, or a fraction of the depth;
            several for several clusterings.
        segments: equal parts of a clip, whose frames are clustered together; one number per
            clustering, each dividing the one before. None: segments of three frames, or of the
            nearest number that divides the clip.
        clusters: of a segment, one number per clustering; None: from the budget, which several
            clusterings reach in equal ratios.
        algorithm: "k_medoids", "spectral" (on the graph of distances, slow), or the baselines
            "random" and "uniform", in which so many tokens of a segment stand for those near them.
        metric: "euclidean", "cosine", or the p of a Minkowski distance; of k-medoids and baselines.
        aggregate: what a cluster goes on as, its "medoid" or the "mean" of its members.
        normalise: cluster directions (L2-normalised tokens).
        iterations: most rounds of k-medoids.
        sigma: width of the spectral variant's kernel.
        neighbours: links of every token there; None: all.
        clip_frames: of every video, for an encoder alone; None: the images of a call are one.
        prop_attn: add the log of a cluster's size to the attention logits of later blocks; ours,
            for an encoder that was not fine-tuned with the clustering.

    Raises:
        ValueError: a value is out of range, or, in a call, the frames do not divide into segments.

    Example:
        >>> from foveate.core import Budget
        >>> CenterCLIP().plan(12, 49, Budget(retain=1 / 3))
        ((4, 49),)
        >>> CenterCLIP(after=(3, 6), segments=(6, 3)).plan(12, 49, Budget(retain=0.25))
        ((6, 49), (3, 49))

    Source: arXiv 2205.00823, section 3; written from the paper's description.
    """

    after: int | float | tuple[int | float, ...] = 0.5
    segments: int | tuple[int, ...] | None = None
    clusters: int | tuple[int, ...] | None = None
    algorithm: Algorithm = "k_medoids"
    metric: Literal["euclidean", "cosine"] | float = "euclidean"
    aggregate: Aggregate = "medoid"
    normalise: bool = False
    iterations: int = 100
    sigma: float = 2.0
    neighbours: int | None = None
    clip_frames: int | None = None
    prop_attn: bool = False

    card: ClassVar[Card] = Card(
        name="centerclip",
        title="CenterCLIP",
        paper="CenterCLIP: Token Clustering for Efficient Text-Video Retrieval",
        arxiv="2205.00823",
        year=2022,
        url="https://github.com/mzhaoshuai/CenterCLIP",
        licence="CC BY-NC 4.0",
        stages=("encoder",),
        kind="training-free",
        summary="Clusters the patches of consecutive frames inside the encoder; the medoids go on "
        "as one sequence per segment.",
        defaults={
            "MSR-VTT, LSMDC, CLIP ViT-B/32, 12 frames": "after block 6; 6, 4 or 3 segments; 49 "
            "clusters",
            "CLIP ViT-B/16, 12 frames": "after block 6; 4 segments; 160 clusters",
            "ActivityNet, 60 frames": "20, 15 or 12 segments; 49 clusters (B/16: 160)",
        },
        headline=(
            "MSR-VTT 9k, CLIP ViT-B/32 fine-tuned, R@1, memory and time: 43.0, 20.8 GB, 24.4 ms to "
            "43.6, 15.0 GB, 22.9 ms (4 segments); 44.0, 14.2 GB, 22.9 ms (3); spectral 44.2, 43.6 "
            "ms (3)",
            "CLIP ViT-B/16: 45.6 to 48.4 (4 segments of 160), 86.5 ms instead of 59.6",
        ),
        notes=(
            "The paper fine-tunes CLIP with the clustering in place; an encoder that was not is "
            "our extension. There medoids alone change how much attention goes where, which "
            "prop_attn=True (ours) keeps as it was.",
            "Where the encoder's output comes back at full length, every patch has its medoid's, "
            "and the [CLS] tokens of a segment are alike.",
            "Left out: the learned cluster embedding (off by default in the paper), the "
            "neighbourhood mask of the spectral variant, temporal shift and token shift.",
            "Directions alone (normalise=True) have no longest one to start from: ours starts from "
            "the longest token before they are normalised; likewise the spectral variant.",
            "A segment attends as one sequence, so a large share of its patches (above 0.85 of "
            "three frames of 256) costs more than the untouched encoder.",
            "Inside a vision-language model it acts on videos, whose clips must be equally long in "
            "one call, and saves encoder time, not prompt length.",
        ),
        retain=1 / 3,
    )
    encoder_point: ClassVar = "block_start"

    def __post_init__(self) -> None:
        for name in ("after", "segments", "clusters"):  # JSON has no tuples.
            if isinstance(getattr(self, name), list):
                object.__setattr__(self, name, tuple(getattr(self, name)))
        steps = len(self._after)
        for name in ("segments", "clusters"):
            given = _listed(getattr(self, name))
            if given is not None and (len(given) != steps or any(n < 1 for n in given)):
                raise ValueError(
                    f"{name} takes one number >= 1 per clustering ({steps}), got "
                    f"{getattr(self, name)!r}."
                )
        segments = _listed(self.segments)
        if steps > 1 and segments is None:
            raise ValueError(f"{steps} clusterings need segments, one number each.")
        if segments is not None and any(a % b for a, b in pairwise(segments)):
            raise ValueError(f"Each number of segments must divide the one before, got {segments}.")
        if any(v <= 0 for v in self._after) or list(self._after) != sorted(self._after):
            raise ValueError(f"after must be ascending and above 0, got {self.after!r}.")
        for name, options in (("algorithm", Algorithm), ("aggregate", Aggregate)):
            if getattr(self, name) not in get_args(options):
                choices = ", ".join(map(repr, get_args(options)))
                raise ValueError(f"{name} must be {choices}, got {getattr(self, name)!r}.")
        if isinstance(self.metric, str):
            if self.metric not in ("euclidean", "cosine"):
                raise ValueError(
                    f'metric must be "euclidean", "cosine" or a p, got {self.metric!r}.'
                )
        elif not self.metric >= 1:
            raise ValueError(f"the p of a metric must be at least 1, got {self.metric}.")
        least = {"iterations": 1, "neighbours": 1, "clip_frames": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} must be at least {low}, got {value}.")
        if not self.sigma > 0:
            raise ValueError(f"sigma must be above 0, got {self.sigma}.")

    @property
    def proportional_attention(self) -> bool:
        """`prop_attn`."""
        return self.prop_attn

    def blocks(self, num_layers: int) -> tuple[int, ...]:
        """The 0-based block before which each clustering is done.

        Raises:
            ValueError: no block is left behind one, or two are before the same block.

        Example:
            >>> CenterCLIP(after=6).blocks(12), CenterCLIP().blocks(23)
            ((6,), (12,))
        """
        found = [blocks_run(value, num_layers) for value in self._after]
        if found[-1] >= num_layers or len(set(found)) < len(found):
            raise ValueError(
                f"after = {self.after!r}: this encoder has {num_layers} blocks, of which one at "
                "least must run behind every clustering."
            )
        return tuple(found)

    def plan(self, frames: int, num_patches: int, budget: Budget) -> tuple[tuple[int, int], ...]:
        """Segments and clusters of each, for every clustering.

        Args:
            frames: of a video.
            num_patches: of a frame.
            budget: of all patches of a video together.

        Raises:
            ValueError: the frames do not divide into the segments.
        """
        segments = _listed(self.segments)
        if segments is None:
            divisors = [d for d in range(1, frames + 1) if frames % d == 0]
            segments = (frames // min(divisors, key=lambda d: (abs(d - 3), -d)),)
        if frames % segments[0]:
            raise ValueError(
                f"centerclip: {frames} frames do not divide into {segments[0]} segments. Sample "
                f"another number of frames, or set segments to a divisor of {frames}."
            )
        given, total = _listed(self.clusters), frames * num_patches
        share = max(1, budget.count(total)) / total
        counts, left = [], num_patches  # of one row
        joined = 1
        for number, parts in enumerate(segments):
            wanted = total * share ** ((number + 1) / len(segments)) / parts
            wanted = round(wanted) if given is None else given[number]
            left = left * (frames // parts) // joined
            joined = frames // parts
            left = max(1, min(wanted, left))
            counts.append((parts, left))
        return tuple(counts)

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when no block is left behind a clustering."""
        if num_encoder_layers is not None:
            self.blocks(num_encoder_layers)

    def encoder_joins(self, tokens: Tokens, context: EncoderContext) -> int:
        """Join the frames of every segment."""
        if context.layer == 0:
            frames = context.state["frames"] = context.video_frames(self.clip_frames)
            context.state["prefix"] = context.num_prefix
            if frames:
                num_patches = tokens.num_tokens - context.num_prefix
                context.state["plan"] = self.plan(frames, num_patches, context.budget)
        step = self._step(context)
        return 1 if step is None else context.state["frames"] // step[0] // context.joined

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Cluster the patches of every segment. O(R n^2 (C + rounds)) time, O(R n^2) memory."""
        step = self._step(context)
        if step is None:
            return None
        prefix, device = context.num_prefix, tokens.device
        x_RnC = tokens.x_BND[:, prefix:].detach().float()
        R, n, _ = x_RnC.shape
        medoid_RK, assignment_Rn = self._clusters(x_RnC, step[1], context)
        num_cls = context.state["prefix"]
        # The prefix tokens of every frame in turn, each kind averaged over the frames.
        kind_Rp = (torch.arange(prefix, device=device) % max(num_cls, 1)).expand(R, prefix)
        own_Rc = torch.arange(num_cls, device=device).expand(R, num_cls)
        target_RN = torch.cat([kind_Rp, assignment_Rn + num_cls], dim=1)
        anchor_RM = torch.cat([own_Rc, medoid_RK + prefix], dim=1)
        weight_RN = None
        if self.aggregate == "medoid":
            weight_Rn = torch.zeros(R, n, device=device).scatter_(1, medoid_RK, 1.0)
            weight_RN = torch.cat([torch.ones(R, prefix, device=device), weight_Rn], dim=1)
        context.note("clusters", lambda: target_RN.masked_fill(target_RN < num_cls, -1), "label")
        return Reduction.merge(target_RN, num_cls + medoid_RK.shape[1], weight_RN, anchor_RM)

    def _clusters(
        self, x_RnC: torch.Tensor, k: int, context: EncoderContext
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Medoids, ascending [R, K], and the cluster of every token [R, n]."""
        R, n, _ = x_RnC.shape
        first_R = torch.linalg.vector_norm(x_RnC, dim=-1).argmax(-1)
        if self.normalise:
            x_RnC = normalize(x_RnC, dim=-1)
        if self.algorithm == "spectral":
            links = None if self.neighbours is None else min(self.neighbours, n - 1)
            return ops.spectral_medoids(
                x_RnC, k, sigma=self.sigma, neighbours=links, iterations=self.iterations
            )
        if self.algorithm == "k_medoids":
            return ops.k_medoids(
                x_RnC, k, first=first_R, iterations=self.iterations, metric=self.metric
            )
        if self.algorithm == "random":
            chosen_RK = ops.random_indices(R, n, k, seed=context.seed, device=x_RnC.device)
        else:
            chosen_RK = ops.uniform_indices(n, k, x_RnC.device).expand(R, k)
        return ops.k_medoids(x_RnC, k, init=chosen_RK, iterations=0, metric=self.metric)

    def _step(self, context: EncoderContext) -> tuple[int, int] | None:
        """Segments and clusters of the clustering before the running block."""
        blocks = self.blocks(context.num_layers)
        if not context.state.get("frames") or context.layer not in blocks:
            return None
        return context.state["plan"][blocks.index(context.layer)]

    @property
    def _after(self) -> tuple[int | float, ...]:
        return self.after if isinstance(self.after, tuple) else (self.after,)


def _listed(value: int | tuple[int, ...] | None) -> tuple[int, ...] | None:
    return (value,) if isinstance(value, int) else value
