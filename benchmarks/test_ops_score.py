"""Which way to sum attention columns is faster: tiles of rows, or the gradient of SDPA?

    OMP_NUM_THREADS=2 python -m pytest benchmarks/test_ops_score.py --benchmark-enable \
        --benchmark-columns=median,iqr,rounds --benchmark-sort=name

Runs on a GPU when there is one. `attention_column_sums` chooses its `"auto"` backend by this table;
"rows512" is the textbook chunked form (512 rows of all heads at once), kept for comparison.
Without `--benchmark-enable` every case runs once and only its result is checked.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from foveate.ops import attention_column_sums

# (B, H, G, N, D, causal): a SigLIP block for 1 and 8 frames, and one decoder layer of a 0.5B and of
# a 7B LLM in a prefill of 4096 tokens.
CASES = {
    "siglip-1x729": (1, 16, 16, 729, 72, False),
    "siglip-8x729": (8, 16, 16, 729, 72, False),
    "llm0.5b-4096": (1, 14, 2, 4096, 64, True),
    "llm7b-4096": (1, 28, 4, 4096, 128, True),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def rows512(q: Tensor, k: Tensor, causal: bool) -> Tensor:
    """Softmax of 512 rows of all heads at a time."""
    B, H, N, D = q.shape
    k = k.repeat_interleave(H // k.shape[1], dim=1)
    columns = q.new_zeros(B, N)
    for start in range(0, N, 512):
        logits = q[:, :, start : start + 512] @ k.transpose(-1, -2) * D**-0.5
        if causal:
            rows = torch.arange(start, start + logits.shape[2], device=q.device)
            ahead = torch.arange(N, device=q.device) > rows[:, None]
            logits = logits.masked_fill(ahead, -torch.inf)
        columns += torch.softmax(logits, -1).sum(2).mean(1)
    return columns


@pytest.mark.parametrize("form", ["chunked", "backward", "rows512"])
@pytest.mark.parametrize("case", CASES)
def test_column_sums(benchmark, case: str, form: str) -> None:
    B, H, G, N, D, causal = CASES[case]
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(B, H, N, D, generator=generator).to(DEVICE)
    k = torch.randn(B, G, N, D, generator=generator).to(DEVICE)

    def run() -> Tensor:
        if form == "rows512":
            columns = rows512(q, k, causal)
        else:
            columns = attention_column_sums(q, k, causal=causal, backend=form)
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        return columns

    columns = benchmark.pedantic(run, rounds=5, warmup_rounds=1)
    torch.testing.assert_close(columns.sum(-1), torch.full((B,), float(N), device=DEVICE))
