"""Token scores: attention received, page rank and similarity, gathered from their modules."""

from foveate.ops.attention import (
    attend_and_score,
    attention_column_sums,
    attention_matrix,
    attention_received_and_kept,
    attention_rows,
    masked_softmax,
    received_attention,
)
from foveate.ops.rank import page_rank, page_rank_qk
from foveate.ops.similarity import (
    adjacent_similarity,
    cosine_similarity_matrix,
    most_similar,
    pairwise_distance,
)

__all__ = [
    "adjacent_similarity",
    "attend_and_score",
    "attention_column_sums",
    "attention_matrix",
    "attention_received_and_kept",
    "attention_rows",
    "cosine_similarity_matrix",
    "masked_softmax",
    "most_similar",
    "page_rank",
    "page_rank_qk",
    "pairwise_distance",
    "received_attention",
]
