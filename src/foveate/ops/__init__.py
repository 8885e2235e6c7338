"""Pure tensor functions that methods are written with: score, select, merge, cluster, segment.

Everything here takes and returns tensors or plain numbers; nothing knows about models. Ties always
go to the lowest index, sums run in at least float32, and results do not depend on the device.
"""

from foveate.ops.allocate import (
    linear_decay_schedule,
    parse_r,
    proportional,
    round_half_even,
    split_evenly,
)
from foveate.ops.cluster import (
    density_peak_scores,
    dpc_knn,
    k_centre,
    k_medoids,
    kmeans,
    nearest_centre,
    spectral_medoids,
)
from foveate.ops.coverage import facility_location
from foveate.ops.diversity import max_sum_diversity
from foveate.ops.duplicates import duplicate_links, follow_links
from foveate.ops.early_exit import (
    least_sure_tokens,
    presence_scores,
    ranks_in_class,
    sure_tokens,
)
from foveate.ops.equal_distance import equal_distance_attention
from foveate.ops.flow import concentration, cut_towards, flow_score
from foveate.ops.gumbel import gumbel_keep, gumbel_noise, gumbel_top_k
from foveate.ops.interleave import interleave
from foveate.ops.merge import (
    Matching,
    bipartite_matching,
    gather_tokens,
    halving_weights,
    merge_matched,
    scatter_mean,
    scatter_sum,
    unmerge,
)
from foveate.ops.motion import (
    image_patches,
    jensen_shannon,
    last_true,
    patch_change,
)
from foveate.ops.outliers import local_outlier_factor
from foveate.ops.peak import peak_attention
from foveate.ops.quantise import Quantised, quantise
from foveate.ops.recovery import cross_attention, interpolate_places
from foveate.ops.resample import average_matrix, bilinear_matrix
from foveate.ops.scan import (
    linear_recurrence,
    path_gaps,
    selective_scan,
    serpentine_ranks,
)
from foveate.ops.schedule import earlier_layers, mean_share, share_schedule
from foveate.ops.score import (
    adjacent_similarity,
    attend_and_score,
    attention_column_sums,
    attention_matrix,
    attention_received_and_kept,
    attention_rows,
    cosine_similarity_matrix,
    masked_softmax,
    most_similar,
    page_rank,
    page_rank_qk,
    pairwise_distance,
    received_attention,
)
from foveate.ops.segment import (
    Segmentation,
    change_points,
    optimal_partition,
    scene_segments,
    segment_by_gain,
)
from foveate.ops.select import (
    max_min_diversity,
    random_indices,
    ranks,
    top_k,
    top_k_ragged,
    top_k_ranked,
    uniform_indices,
)
from foveate.ops.state_space import diagonal_kernel, diagonal_recurrence, fft_convolve
from foveate.ops.stretch import ntk_base, ntk_frequencies
from foveate.ops.windows import (
    cell_shares,
    cut_windows,
    join_windows,
    pool_windows,
    surroundings,
    windows_of,
)

__all__ = [
    "Matching",
    "Quantised",
    "Segmentation",
    "adjacent_similarity",
    "attend_and_score",
    "attention_column_sums",
    "attention_matrix",
    "attention_received_and_kept",
    "attention_rows",
    "average_matrix",
    "bilinear_matrix",
    "bipartite_matching",
    "cell_shares",
    "change_points",
    "concentration",
    "cosine_similarity_matrix",
    "cross_attention",
    "cut_towards",
    "cut_windows",
    "density_peak_scores",
    "diagonal_kernel",
    "diagonal_recurrence",
    "dpc_knn",
    "duplicate_links",
    "earlier_layers",
    "equal_distance_attention",
    "facility_location",
    "fft_convolve",
    "flow_score",
    "follow_links",
    "gather_tokens",
    "gumbel_keep",
    "gumbel_noise",
    "gumbel_top_k",
    "halving_weights",
    "image_patches",
    "interleave",
    "interpolate_places",
    "jensen_shannon",
    "join_windows",
    "k_centre",
    "k_medoids",
    "kmeans",
    "last_true",
    "least_sure_tokens",
    "linear_decay_schedule",
    "linear_recurrence",
    "local_outlier_factor",
    "masked_softmax",
    "max_min_diversity",
    "max_sum_diversity",
    "mean_share",
    "merge_matched",
    "most_similar",
    "nearest_centre",
    "ntk_base",
    "ntk_frequencies",
    "optimal_partition",
    "page_rank",
    "page_rank_qk",
    "pairwise_distance",
    "parse_r",
    "patch_change",
    "path_gaps",
    "peak_attention",
    "pool_windows",
    "presence_scores",
    "proportional",
    "quantise",
    "random_indices",
    "ranks",
    "ranks_in_class",
    "received_attention",
    "round_half_even",
    "scatter_mean",
    "scatter_sum",
    "scene_segments",
    "segment_by_gain",
    "selective_scan",
    "serpentine_ranks",
    "share_schedule",
    "spectral_medoids",
    "split_evenly",
    "sure_tokens",
    "surroundings",
    "top_k",
    "top_k_ragged",
    "top_k_ranked",
    "uniform_indices",
    "unmerge",
    "windows_of",
]
