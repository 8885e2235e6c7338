"""Clustering of tokens: density peaks (DPC-kNN), k-means, k-medoids and greedy k-centre.

All are deterministic: no noise unless a generator is given, ties go to the lowest index.

Legend of shape suffixes: B batch, N tokens, C channels, m or K clusters.
"""

from __future__ import annotations

import torch
from torch import Tensor

from foveate.ops._common import (
    batched,
    full_precision,
    require_count,
    require_dims,
    require_shape,
    widen,
)
from foveate.ops.diversity import Metric, farthest_rows, k_centre
from foveate.ops.group import scatter_mean
from foveate.ops.similarity import pairwise_distance

__all__ = [
    "density_peak_scores",
    "dpc_knn",
    "k_centre",
    "k_medoids",
    "kmeans",
    "nearest_centre",
    "spectral_medoids",
]


def dpc_knn(
    x_BND: Tensor,
    num_clusters: int,
    *,
    k: int = 7,
    mask: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Cluster tokens around density peaks: dense ones far from anything denser become centres.

    With `d_ij = |x_i - x_j| / sqrt(C)`: density `rho_i = exp(-mean of the k smallest d^2)`, the
    token itself included; `delta_i` is the distance to the nearest denser token (the largest
    distance of all if there is none; of equally dense ones the lower index counts as denser); the
    `num_clusters` largest `rho * delta` are centres, and every other token joins the nearest one.
    O(N^2 C); no gradient.

    Args:
        x_BND: [N, C] or [B, N, C].
        num_clusters: m, 0 <= m <= (valid) tokens.
        k: neighbours of the density, itself included; clamped to `num_clusters`.
        mask: [N] or [B, N] bool, True for tokens that take part.
        generator: adds uniform noise in [0, 1e-6) to the densities, as the published code does.

    Returns:
        Centres [B, m], ascending positions, and the assignment [B, N], an index into the centres
        (-1 for masked tokens, and for all when m = 0); both without B for [N, C] input.

    Raises:
        ValueError: shapes do not fit or `num_clusters` is out of range.

    Example:
        >>> x = torch.tensor([[0.0], [0.1], [0.2], [5.0], [5.1]])
        >>> centres, assignment = dpc_knn(x, 2)
        >>> centres.tolist(), assignment.tolist()
        ([0, 3], [0, 0, 0, 1, 1])

    Source: Du et al. 2016 (DPC-kNN); HoliTom's spatial merge (arXiv 2505.21334).
    """
    x, added = batched(x_BND, "x")
    B, N, C = x.shape
    mask_BN = _batched_mask(mask, x, added)
    require_count(num_clusters, 0, _fewest(mask_BN, N), "num_clusters", "(valid) tokens")
    if k < 1:
        raise ValueError(f"k must be at least 1 neighbour, got {k}")
    if num_clusters == 0:
        centres_Bm, assignment_BN = x.new_zeros(2, B, 0).long()[0], x.new_full((B, N), -1).long()
        return _unbatch(centres_Bm, assignment_BN, added)
    with torch.no_grad(), full_precision(x.device):
        distance_BNN = _symmetric_distance(x) / C**0.5
        score_BN = _peak_score(distance_BNN, min(k, num_clusters), mask_BN, generator)
        ranked_BN = torch.sort(score_BN, dim=-1, descending=True, stable=True).indices
        centres_Bm = ranked_BN[:, :num_clusters].sort(-1).values
        assignment_BN = _nearest_centre(distance_BNN, centres_Bm)
        if mask_BN is not None:
            assignment_BN = assignment_BN.masked_fill(~mask_BN, -1)
        return _unbatch(centres_Bm, assignment_BN, added)


def density_peak_scores(
    x_BND: Tensor,
    k: int,
    *,
    generator: torch.Generator | None = None,
    noise_BN: Tensor | None = None,
) -> Tensor:
    """How much every token is a density peak, `rho * delta` of `dpc_knn`, [B, N]. O(N^2 C).

    For methods that choose by the score with conditions of their own; no gradient.

    Args:
        x_BND: [B, N, C].
        k: neighbours of the density, itself included; clamped to N.
        generator: adds uniform noise in [0, 1e-6) to the densities.
        noise_BN: uniform numbers in [0, 1) to take for it instead.

    Raises:
        ValueError: shapes do not fit, or both kinds of noise are given.

    Example:
        >>> x = torch.tensor([[[0.0], [0.1], [0.2], [5.0], [5.1]]])
        >>> density_peak_scores(x, 2).topk(2).indices.sort().values.tolist()
        [[0, 3]]
    """
    require_dims(x_BND, 3, "x", "[B, N, C]")
    if k < 1:
        raise ValueError(f"k must be at least 1 neighbour, got {k}")
    if generator is not None and noise_BN is not None:
        raise ValueError("give either noise or generator, not both")
    if noise_BN is not None:
        require_shape(noise_BN, tuple(x_BND.shape[:2]), "noise")
    with torch.no_grad(), full_precision(x_BND.device):
        distance_BNN = _symmetric_distance(x_BND) / x_BND.shape[-1] ** 0.5
        return _peak_score(distance_BNN, min(k, x_BND.shape[1]), None, generator, noise_BN)


def nearest_centre(x_BND: Tensor, centres_BK: Tensor) -> Tensor:
    """Which of the tokens `centres_BK` is nearest to every token, int64 [B, N]. O(N K C).

    A centre is its own, even among exact duplicates; other ties go to the earlier entry.

    Example:
        >>> nearest_centre(torch.tensor([[[0.0], [0.4], [1.0]]]), torch.tensor([[2, 0]])).tolist()
        [[1, 1, 0]]
    """
    require_dims(x_BND, 3, "x", "[B, N, C]")
    with torch.no_grad(), full_precision(x_BND.device):
        B, _, C = x_BND.shape
        centre_BKC = x_BND.gather(1, centres_BK[..., None].expand(B, centres_BK.shape[1], C))
        distance_BKN = pairwise_distance(centre_BKC, x_BND)
        return distance_BKN.scatter_(2, centres_BK[..., None], -1.0).argmin(1)


def kmeans(
    x_BND: Tensor,
    k: int,
    *,
    init: Tensor | None = None,
    iterations: int = 50,
    seed: int = 0,
    metric: Metric = "euclidean",
    tolerance: float = 1e-4,
) -> tuple[Tensor, Tensor]:
    """Cluster tokens by Lloyd's k-means.

    Empty clusters keep their centroid. A sample stops on its own when its centroids move by less
    than `tolerance` (Frobenius norm), so batching changes nothing. O(iterations N K C); one value
    is read back per iteration; no gradient (average again with `scatter_mean` for one).

    Args:
        x_BND: [N, C] or [B, N, C].
        k: clusters, 1 <= k <= N.
        init: rows to start from, [k] or [B, k]; None draws them by k-means++.
        iterations: most rounds of assigning and averaging.
        seed: of the k-means++ draw, made on the CPU, so equal on every device.
        metric: of the assignment; "cosine" compares directions, centroids stay plain means.
        tolerance: movement below which a sample is finished.

    Returns:
        Centroids [B, k, C] (at least float32) and the nearest one of every token, [B, N] int64,
        ties to the lowest; both without B for [N, C] input.

    Raises:
        ValueError: shapes do not fit, `k` or `init` out of range.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [8.0], [9.0]])
        >>> centroids, assignment = kmeans(x, 2, init=torch.tensor([0, 3]))
        >>> centroids.flatten().tolist(), assignment.tolist()
        ([0.5, 8.5], [0, 0, 1, 1])

    Source: Lloyd 1982; Arthur and Vassilvitskii 2007 for the start.
    """
    x, added = batched(x_BND, "x")
    B, N, C = x.shape
    require_count(k, 1, N, "k", "tokens")
    with torch.no_grad(), full_precision(x.device):
        x = widen(x)
        rows_BK = _plus_plus(x, k, seed) if init is None else _initial_rows(init, B, k, N, x.device)
        centroids_BKC = x.gather(1, rows_BK[..., None].expand(B, k, C))
        live_B = torch.ones(B, dtype=torch.bool, device=x.device)
        for _ in range(iterations):
            assignment_BN = pairwise_distance(x, centroids_BKC, metric).argmin(-1)
            mean_BKC = scatter_mean(x, assignment_BN, k)
            empty_BK = _counts(assignment_BN, k) == 0
            mean_BKC = torch.where(empty_BK[..., None], centroids_BKC, mean_BKC)
            shift_B = torch.linalg.vector_norm(mean_BKC - centroids_BKC, dim=(1, 2))
            live_B = live_B & (shift_B >= tolerance)
            centroids_BKC = torch.where(live_B[:, None, None], mean_BKC, centroids_BKC)
            if not bool(live_B.any()):
                break
        assignment_BN = pairwise_distance(x, centroids_BKC, metric).argmin(-1)
        return _unbatch(centroids_BKC, assignment_BN, added)


def k_medoids(
    x_BND: Tensor,
    k: int,
    *,
    init: Tensor | None = None,
    first: Tensor | None = None,
    iterations: int = 100,
    metric: Metric | float = "euclidean",
) -> tuple[Tensor, Tensor]:
    """Cluster tokens around `k` of themselves (medoids).

    Alternates nearest medoid and, per cluster, the member with the smallest summed distance to the
    members, until nothing moves. A medoid always belongs to its own cluster, so none is empty.
    O(N^2 C + iterations N^2); one value is read back per iteration; no gradient.

    Args:
        x_BND: [N, C] or [B, N, C].
        k: clusters, 1 <= k <= N.
        init: rows to start from, [k] or [B, k]; None starts from the row of largest norm and adds
            the farthest one each time (KKZ).
        first: the row that KKZ starts from instead, [B].
        iterations: most rounds; 0 only assigns.
        metric: "euclidean", "cosine", or the p of a Minkowski distance.

    Returns:
        Medoids [B, k], ascending positions, and the assignment [B, N], an index into the medoids,
        ties to the lowest; both without B for [N, C] input.

    Raises:
        ValueError: shapes do not fit, `k` or `init` out of range.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [9.0]])
        >>> medoids, assignment = k_medoids(x, 2)
        >>> medoids.tolist(), assignment.tolist()
        ([1, 3], [0, 0, 0, 1])

    Source: CenterCLIP, multi-segment token clustering (arXiv 2205.00823).
    """
    x, added = batched(x_BND, "x")
    B, N, _ = x.shape
    require_count(k, 1, N, "k", "tokens")
    with torch.no_grad(), full_precision(x.device):
        distance_BNN = _symmetric_distance(x, metric)
        if init is not None:
            medoids_BK = _initial_rows(init, B, k, N, x.device)
        else:
            longest_B = torch.linalg.vector_norm(widen(x), dim=-1).argmax(-1)
            medoids_BK = farthest_rows(distance_BNN, k, longest_B if first is None else first)
        for _ in range(iterations):
            assignment_BN = _nearest_centre(distance_BNN, medoids_BK)
            moved_BK = _cheapest_members(distance_BNN, assignment_BN, k)
            if torch.equal(moved_BK, medoids_BK):
                break
            medoids_BK = moved_BK
        medoids_BK = medoids_BK.sort(-1).values
        return _unbatch(medoids_BK, _nearest_centre(distance_BNN, medoids_BK), added)


def spectral_medoids(
    x_BND: Tensor,
    k: int,
    *,
    sigma: float = 2.0,
    neighbours: int | None = None,
    iterations: int = 100,
) -> tuple[Tensor, Tensor]:
    """Cluster tokens by `k_medoids` on the graph of their distances (normalised spectral).

    Weights `exp(-d^2 / 2 sigma^2)`, the `k` eigenvectors of the symmetric normalised Laplacian with
    the smallest eigenvalues, their rows scaled to length 1. KKZ starts from the row that was
    longest before. O(N^3); no gradient.

    Args:
        x_BND: [N, C] or [B, N, C].
        k: clusters, 1 <= k <= N.
        sigma: width of the kernel, a Euclidean distance.
        neighbours: links of every token, the nearest others; a link of either side counts. None:
            all.
        iterations: most rounds of k-medoids.

    Returns:
        As `k_medoids`.

    Raises:
        ValueError: shapes do not fit, `k` or `neighbours` out of range, or `sigma` is not above 0.

    Example:
        >>> x = torch.tensor([[0.0], [1.0], [20.0], [21.0]])
        >>> spectral_medoids(x, 2)[1].tolist()
        [0, 0, 1, 1]

    Source: Ng, Jordan and Weiss 2001; CenterCLIP's spectral variant (arXiv 2205.00823).
    """
    x, added = batched(x_BND, "x")
    _, N, _ = x.shape
    require_count(k, 1, N, "k", "tokens")
    if not sigma > 0:
        raise ValueError(f"sigma must be above 0, got {sigma}")
    with torch.no_grad(), full_precision(x.device):
        distance_BNN = _symmetric_distance(x)
        weight_BNN = (-(distance_BNN.square()) / (2 * sigma**2)).exp()
        if neighbours is not None:
            require_count(neighbours, 1, N - 1, "neighbours", "other tokens")
            near_BNn = distance_BNN.argsort(dim=-1, stable=True)[..., : neighbours + 1]
            linked_BNN = torch.zeros_like(weight_BNN, dtype=torch.bool).scatter_(2, near_BNn, True)
            weight_BNN = weight_BNN * (linked_BNN | linked_BNN.transpose(1, 2))
        scale_BN = weight_BNN.sum(-1).rsqrt()
        # Of D^-1/2 W D^-1/2: its largest are the smallest of the Laplacian.
        _, vector_BNN = torch.linalg.eigh(scale_BN[:, :, None] * weight_BNN * scale_BN[:, None])
        row_BNk = vector_BNN[..., N - k :]
        length_BN = torch.linalg.vector_norm(row_BNk, dim=-1)
        row_BNk = row_BNk / length_BN.clamp_min(1e-12)[..., None]
        medoids, assignment = k_medoids(
            row_BNk, k, first=length_BN.argmax(-1), iterations=iterations
        )
        return _unbatch(medoids, assignment, added)


def _peak_score(
    distance_BNN: Tensor,
    k: int,
    mask_BN: Tensor | None,
    generator: torch.Generator | None,
    noise_BN: Tensor | None = None,
) -> Tensor:
    """rho * delta of every token; -inf where masked."""
    square_BNN = distance_BNN.square()
    if mask_BN is not None:
        square_BNN = square_BNN.masked_fill(~mask_BN[:, None], torch.inf)
    density_BN = (-square_BNN.topk(k, dim=-1, largest=False).values.mean(-1)).exp()
    if generator is not None:
        noise_BN = torch.rand(density_BN.shape, generator=generator, device=generator.device)
    if noise_BN is not None:
        density_BN = density_BN + noise_BN.to(density_BN) * 1e-6
    spread_BNN = distance_BNN
    if mask_BN is not None:
        density_BN = density_BN.masked_fill(~mask_BN, -torch.inf)
        pair_BNN = mask_BN[:, None] & mask_BN[:, :, None]
        spread_BNN = distance_BNN.masked_fill(~pair_BNN, 0.0)
    farthest_B1 = spread_BNN.flatten(1).amax(-1, keepdim=True)
    # Equal densities are common (mutual nearest neighbours when k = 2, flat background): the lower
    # index counts as denser, or both of a pair would become centres side by side.
    index_N = torch.arange(density_BN.shape[1], device=density_BN.device)
    here_BN1, there_B1N = density_BN[:, :, None], density_BN[:, None, :]
    denser_BNN = (there_B1N > here_BN1) | (
        (there_B1N == here_BN1) & (index_N[None, :] < index_N[:, None])
    )
    delta_BN = distance_BNN.masked_fill(~denser_BNN, torch.inf).amin(-1)
    score_BN = torch.minimum(delta_BN, farthest_B1) * density_BN
    return score_BN if mask_BN is None else score_BN.masked_fill(~mask_BN, -torch.inf)


def _nearest_centre(distance_BNN: Tensor, centres_BK: Tensor) -> Tensor:
    """Index of the nearest centre; a centre is its own, even among exact duplicates."""
    B, N, _ = distance_BNN.shape
    K = centres_BK.shape[1]
    to_centre_BKN = distance_BNN.gather(1, centres_BK[..., None].expand(B, K, N))
    # A distance is never negative, so -1 settles every tie with another centre.
    return to_centre_BKN.scatter_(2, centres_BK[..., None], -1.0).argmin(1)


def _cheapest_members(distance_BNN: Tensor, assignment_BN: Tensor, k: int) -> Tensor:
    """The member of every cluster whose distances to the others add up to least, [B, K]."""
    B, N, _ = distance_BNN.shape
    apart_BNN = assignment_BN[:, :, None] != assignment_BN[:, None]
    cost_BN = distance_BNN.masked_fill(apart_BNN, 0.0).sum(-1)
    least_BK = cost_BN.new_full((B, k), torch.inf)
    least_BK = least_BK.scatter_reduce(1, assignment_BN, cost_BN, "amin")
    index_N = torch.arange(N, device=cost_BN.device)
    first_BN = index_N.where(cost_BN == least_BK.gather(1, assignment_BN), N)
    # Features that are no numbers have no cheapest member.
    first_BK = first_BN.new_full((B, k), N).scatter_reduce(1, assignment_BN, first_BN, "amin")
    return first_BK.clamp_max(N - 1)


def _symmetric_distance(x_BNC: Tensor, metric: Metric | float = "euclidean") -> Tensor:
    """Distances of all pairs, exactly symmetric and 0 on the diagonal.

    A matrix product may round (i, j) and (j, i) differently, which would decide ties at random.
    """
    if isinstance(metric, str):
        distance_BNN = pairwise_distance(x_BNC, x_BNC, metric)
    else:
        distance_BNN = torch.cdist(widen(x_BNC), widen(x_BNC), p=metric)
    distance_BNN = torch.maximum(distance_BNN, distance_BNN.transpose(-1, -2)).clamp_min_(0)
    distance_BNN.diagonal(dim1=-2, dim2=-1).zero_()
    return distance_BNN


def _plus_plus(x_BNC: Tensor, k: int, seed: int) -> Tensor:
    """Draw initial rows by k-means++: probability proportional to the squared distance."""
    B, N, _ = x_BNC.shape
    batch = torch.arange(B, device=x_BNC.device)
    generator = torch.Generator().manual_seed(seed)
    draw_BK = torch.rand(B, k, generator=generator, dtype=torch.float64).to(x_BNC.device)
    rows_BK = torch.empty(B, k, dtype=torch.long, device=x_BNC.device)
    weight_BN = torch.ones(B, N, dtype=torch.float64, device=x_BNC.device)
    for step in range(k):
        total_BN = weight_BN.cumsum(-1)
        aim_B1 = (draw_BK[:, step] * total_BN[:, -1])[:, None]
        row_B = torch.searchsorted(total_BN, aim_B1, right=True).clamp_max(N - 1).squeeze(1)
        rows_BK[:, step] = row_B
        square_BN = (x_BNC - x_BNC[batch, row_B][:, None]).square().sum(-1).double()
        # A small floor, as in the published code, lets duplicates be drawn when nothing else is
        # left; rows that were drawn are never drawn again.
        square_BN = square_BN + 1e-6
        weight_BN = square_BN if step == 0 else torch.minimum(weight_BN, square_BN)
        weight_BN = weight_BN.scatter(1, rows_BK[:, : step + 1], 0.0)
    return rows_BK


def _initial_rows(init: Tensor, B: int, k: int, N: int, device: torch.device) -> Tensor:
    if tuple(init.shape) not in ((k,), (B, k)):
        raise ValueError(f"init must be [{k}] or [{B}, {k}] rows, got {tuple(init.shape)}")
    rows_BK = init.to(device=device, dtype=torch.long).expand(B, k)
    if rows_BK.numel() and (int(rows_BK.min()) < 0 or int(rows_BK.max()) >= N):
        raise ValueError(f"init rows must be in 0 .. {N - 1}")
    return rows_BK


def _counts(assignment_BN: Tensor, k: int) -> Tensor:
    counts_BK = assignment_BN.new_zeros(assignment_BN.shape[0], k)
    return counts_BK.scatter_add_(1, assignment_BN, torch.ones_like(assignment_BN))


def _batched_mask(mask: Tensor | None, x: Tensor, added: bool) -> Tensor | None:
    if mask is None:
        return None
    B, N, _ = x.shape
    require_shape(mask, (N,) if added else (B, N), "mask")
    return mask.reshape(B, N)


def _fewest(mask_BN: Tensor | None, N: int) -> int:
    return N if mask_BN is None or not mask_BN.numel() else int(mask_BN.sum(-1).min())


def _unbatch(first: Tensor, second: Tensor, added: bool) -> tuple[Tensor, Tensor]:
    return (first.squeeze(0), second.squeeze(0)) if added else (first, second)
