"""What trained methods keep of the networks of the task `shapes`, on held-out pictures.

Legend: B pictures, T semantic tokens, P patches.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from foveate.training.task import Outcome
from foveate.training.tasks.shapes_bench import Bench, Pass, asked, noted
from foveate.training.tasks.shapes_model import EARLY, IMAGE_BLOCKS, PLANE

_PATCHES = PLANE[0] * PLANE[1]
#: dtop's thresholds; the bars are asked of the first, the published one.
TAUS = (0.9, 0.95, 0.99, 0.995, 0.998)


def exits(bench: Bench) -> list[Outcome]:
    """dtop trained with patches leaving, and alike with all; flat pictures against cluttered ones.

    The heads on the frozen trunk, with which both begin, are there for comparison.
    """

    def run_of(network: str, heads: str, tau: float) -> Pass:
        masks = bench.modules[heads]
        assert isinstance(masks, nn.ModuleList)
        options = {"tau": tau, "after": EARLY, "heads": tuple(masks)}
        return Pass(bench.modules[network], bench.held, "dtop", options)

    def row_of(run: Pass, words: str = "") -> Outcome:
        row = bench.segmented(run)
        spent = [(sum(one.reduced), sum(one.heads)) for one in (run, full)]
        return replace(
            noted(row, f"with the heads {sum(spent[0]) / sum(spent[1]):.1%} of tau=1"),
            recipe=f"{row.recipe}{words}",
        )

    full = run_of("dense", "dense_masks", 1.0)
    dense = row_of(full, ", trained with all patches")
    frozen = [
        row_of(run_of("trunk", "masks", tau), ", heads on the frozen trunk") for tau in (1.0, 0.9)
    ]
    runs = [run_of("exits", "exits_masks", tau) for tau in (1.0, *TAUS)]
    own, row, *others = [row_of(run) for run in runs]
    best, run = max(dense.value, own.value, frozen[0].value), runs[1]
    good = best - row.value <= 1 and run.share() <= 0.8
    note = f"{row.value - best:+.2f} points against the best of tau=1"
    row = asked(row, "20 % fewer FLOPs: within 1 point of the best of tau=1", good, note)
    quarter = max(1, len(run.reduced) // 4)
    flat, cluttered = run.share(slice(quarter)), run.share(slice(-quarter, None))
    less = partial(Outcome, run.recipe, "FLOPs (%)")
    bar = "flat pictures cost less than cluttered ones"
    return [
        dense, own, row, *others, *frozen,
        less(100 * flat, flat, bar, flat < cluttered, "flattest quarter"),
        less(100 * cluttered, cluttered, on="most cluttered quarter"),
    ]  # fmt: skip


def semantic(bench: Bench, untouched: Outcome, dense: Outcome) -> list[Outcome]:
    """stvit's network: class from 16 semantic tokens, patches from what is recovered."""
    modules = bench.modules
    vit = modules["semantic"]
    heads = int(vit.config.num_attention_heads)  # pyright: ignore
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder) / "stvit.safetensors")
        save_file(stvit_weights(modules), file)
        options = {"after": IMAGE_BLOCKS, "weights": file, "num_heads": heads}
        run = Pass(vit, bench.held, "stvit", options)
        row = bench.accuracy(run, "semantic_classify")
        good = untouched.value - row.value <= 1 and run.share() <= 0.55
        note = bench.against(row, untouched)
        row = asked(row, "45 % fewer FLOPs: within 1 point", good, note)
        full = Pass(vit, bench.held, "stvit", {**options, "restore": True})
        patches = bench.segmented(full, "semantic_segment")
    extra = recover_flops(modules, len(bench.held.label_B)) / sum(full.untouched)
    patches = replace(patches, flops=full.share() + extra)
    note = "the block that recovers included"
    good = dense.value - patches.value <= 2
    return [row, asked(patches, "recovered: within 2 points", good, note)]


def stvit_weights(modules: dict[str, nn.Module]) -> dict[str, Tensor]:
    """Learned centres and the block that recovers, by the names that stvit reads."""
    parts = {**modules["centres"].state_dict()}
    parts |= {f"recover.{name}": x for name, x in modules["recover"].state_dict().items()}
    return {name: x.detach().cpu().clone() for name, x in parts.items()}


def recover_flops(modules: dict[str, nn.Module], count: int) -> float:
    """FLOPs of the block that recovers, which no report counts, for so many pictures."""
    block: Any = modules["recover"]
    hidden, width = block.mlp.fc1.weight.shape
    num = block_tokens(modules)
    # Projections and MLP of all patches, keys and values of the semantic tokens, attention.
    linear = _PATCHES * (2 * width * width + 2 * width * hidden) + num * 2 * width * width
    return 2.0 * count * (linear + 2 * _PATCHES * num * width)


def block_tokens(modules: dict[str, nn.Module]) -> int:
    """Semantic tokens of a picture."""
    return modules["centres"].state_dict()["global_tokens"].shape[1]
