"""One row per registered method: what the shared suite needs to know to run it on tiny models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from tiny import PACKED, TINY_FAMILIES

#: Families whose adapter knows videos; others see frames as images.
WITH_VIDEOS = (
    "llava_next_video",
    "llava_onevision",
    "video_llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "video_llama_3",
)


@cache
def segmentation_heads() -> dict[str, Any]:
    """Heads for three classes on the tiny encoders, which have 24 channels."""
    from foveate.methods.dtop import MaskHead

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"heads": tuple(MaskHead(24, 3, width=8, num_heads=2).eval() for _ in range(3))}


@dataclass(frozen=True)
class Row:
    """How to run one method on models of four decoder layers and four encoder blocks.

    Attributes:
        recipe: recipe text; arguments where the published ones need a deeper model.
        stages: where it acts.
        retain: the budget of the suite.
        exact: `count` is exact on every layout of the tiny models.
        merges: tokens are averaged, so they are no longer equal to any source.
        families: families it runs on; elsewhere attaching is refused or nothing happens. None: it
            has backbones of its own, and test_backbone_methods.py has the same properties there.
        on_images: it acts on images; if not, only on videos.
        reads_text: the prompt's text takes part in the choice.
        reduces: it takes tokens away; if not, it only changes attention and has no budget.
        rounds: it stores the cache in few bits when groups are full, so that what a token reads
            depends on how many come at a time.
        arguments: gives what cannot be written in a recipe.
    """

    recipe: str
    stages: tuple[str, ...]
    retain: float = 0.4
    exact: bool = True
    merges: bool = False
    families: tuple[str, ...] = TINY_FAMILIES
    on_images: bool = True
    reads_text: bool = False
    reduces: bool = True
    rounds: bool = False
    arguments: Callable[[], dict[str, Any]] = dict


#: Registry name -> row.
METHOD_TABLE: dict[str, Row] = {
    "aim": Row(
        # Some tokens go before the third layer, all others before the fourth.
        "aim(schedule=(1.0, 0.6, 0.0, 0.0))",
        ("projector", "decoder"),
        exact=False,
        merges=True,
        reads_text=True,
    ),
    "b_vllm": Row("b_vllm", ("projector",), exact=False, merges=True, reads_text=True),
    "catp": Row("catp", ("projector", "decoder"), exact=False, reads_text=True),
    "centerclip": Row(
        "centerclip",
        ("encoder",),
        merges=True,
        families=("llava_next_video", "llava_onevision", "video_llava"),
        on_images=False,
    ),
    "divprune": Row("divprune", ("projector",)),
    # Three stages also in encoders whose features come from the third block.
    "dtop": Row(
        "dtop(after=(0.34, 0.67))",
        ("encoder",),
        families=tuple(f for f in TINY_FAMILIES if f not in PACKED),
        arguments=segmentation_heads,
    ),
    "dycoke": Row("dycoke", ("projector", "cache"), on_images=False, reads_text=True),
    "evs": Row("evs", ("projector",), families=WITH_VIDEOS, on_images=False),
    "f2c": Row(
        "f2c",
        ("frames", "projector"),
        exact=False,
        merges=True,
        families=WITH_VIDEOS,
        on_images=False,
        reads_text=True,
    ),
    "fastervlm": Row("fastervlm", ("projector",)),
    "fastv": Row("fastv", ("decoder",), reads_text=True),
    "flowcut": Row(
        # Plain LLaVA has no cut inside the language model by default.
        "flowcut(llm_cut=True)",
        ("encoder", "projector", "decoder"),
        retain=0.2,
        exact=False,
        reads_text=True,
    ),
    "fopru": Row("fopru", ("projector",), exact=False),
    # Pictures of noise: about half of the patches change by more than this.
    "grt": Row(
        "grt(tau=19.6)",
        ("patches", "projector"),
        families=("llava_next_video", "llava_onevision", "video_llava"),
        on_images=False,
    ),
    "hiprune": Row("hiprune(alpha=0.5)", ("projector",), exact=False),
    # One or two slow frames beside the fast path of all, on clips of few frames.
    "free_video_llm": Row(
        "free_video_llm",
        ("projector",),
        retain=0.6,
        merges=True,
        families=WITH_VIDEOS,
        on_images=False,
        reads_text=True,
    ),
    "holitom": Row(
        "holitom(inner_layer=2, tau=0.5)",
        ("projector", "decoder"),
        exact=False,
        merges=True,
        families=WITH_VIDEOS,
        on_images=False,
        reads_text=True,
    ),
    "gtp_vit": Row(
        "gtp_vit",
        ("encoder",),
        retain=0.6,
        merges=True,
        families=tuple(f for f in TINY_FAMILIES if f not in PACKED),
    ),
    # Windows and groups small enough that short prompts are stretched and stored.
    "intp": Row(
        "intp(window=16, answer=8, group=4, recent=8)",
        ("decoder", "cache"),
        reduces=False,
        rounds=True,
    ),
    # More tokens in the first range than in the last, so that the last layer is the shortest.
    "lvlm_csp": Row("lvlm_csp(clusters=0.6)", ("decoder",), retain=0.6, reads_text=True),
    "kffocus": Row(
        "kffocus",
        ("frames", "projector"),
        merges=True,
        families=WITH_VIDEOS,
        on_images=False,
        reads_text=True,
    ),
    "m3": Row("m3", ("projector",), merges=True),
    "norm": Row("norm", ("projector",), exact=False),
    "pool": Row("pool", ("projector",), merges=True),
    "pyramiddrop": Row("pyramiddrop", ("decoder",), reads_text=True),
    "qtsplus": Row("qtsplus", ("projector",), exact=False, reads_text=True),
    "quickvideo": Row("quickvideo(group_frames=2)", ("cache",)),
    "quota": Row(
        "quota",
        ("frames", "projector"),
        exact=False,
        merges=True,
        families=WITH_VIDEOS,
        on_images=False,
        reads_text=True,
    ),
    "random": Row("random", ("projector",), exact=False),
    # On planes of few patches every centre would take in all that is left.
    "recoverable": Row(
        "recoverable(merged=4)",
        ("projector",),
        retain=0.5,
        exact=False,
        merges=True,
        reads_text=True,
    ),
    # Random models look at their images to the end: an impossible threshold lets the tokens go.
    "safewatch": Row(
        # The text behind the visual tokens ends in two policies and a query of one token.
        "safewatch(policies=((-4, -2), (-2, -1)))",
        ("decoder", "cache"),
        reads_text=True,
    ),
    "stvit": Row(
        "stvit",
        ("encoder",),
        merges=True,
        families=tuple(f for f in TINY_FAMILIES if f not in PACKED),
    ),
    # [CLS] tokens stay with whole frames, and how many these are depends on the cuts.
    "tdc": Row(
        "tdc", ("projector",), exact=False, merges=True, families=WITH_VIDEOS, on_images=False
    ),
    "tempme": Row(
        "tempme",
        ("encoder",),
        merges=True,
        families=("llava_next_video", "llava_onevision", "video_llava"),
        on_images=False,
    ),
    "todre": Row("todre(tau=1.1)", ("projector", "decoder"), exact=False),
    "token_transforming": Row(
        "token_transforming",
        ("encoder",),
        retain=0.6,
        merges=True,
        families=tuple(f for f in TINY_FAMILIES if f not in PACKED),
    ),
    "hot": Row("hot", ("encoder",), families=()),
    "tovim": Row("tovim", ("encoder",), families=()),
    "s5": Row("s5", ("encoder",), families=()),
    "tome": Row(
        "tome",
        ("encoder",),
        retain=0.6,
        merges=True,
        families=tuple(f for f in TINY_FAMILIES if f not in PACKED),
    ),
    "transprune": Row("transprune", ("decoder",), reads_text=True),
    "ts_llava": Row("ts_llava", ("projector",), families=WITH_VIDEOS, on_images=False),
    "uniform": Row("uniform", ("projector",), exact=False),
    "vflowopt": Row("vflowopt", ("projector", "decoder"), exact=False, merges=True),
    "vidcom2": Row("vidcom2", ("projector",), families=WITH_VIDEOS, on_images=False),
    # Clips of two frames, so that the tiny clips of three and four have a choice to make.
    "video_streaming": Row(
        "video_streaming(clip_frames=2)",
        ("projector",),
        exact=False,
        merges=True,
        families=WITH_VIDEOS,
        on_images=False,
        reads_text=True,
    ),
    "video_xl2": Row(
        "video_xl2(block_units=1, previous_blocks=1, chunk_units=1)", ("cache",), reads_text=True
    ),
    "videoscan": Row("videoscan", ("projector",), merges=True),
    "visionzip": Row("visionzip", ("projector",), exact=False, merges=True),
    "vista_llama": Row("vista_llama", ("decoder",), reduces=False),
    "zero_tprune": Row(
        "zero_tprune",
        ("encoder",),
        families=tuple(f for f in TINY_FAMILIES if f not in PACKED),
    ),
}
