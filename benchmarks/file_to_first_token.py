"""From a file to the first token: one stage after another, in chunks, and with stages overlapped.

Every variant answers the same question about the same frames of the same file, in turn in one
process, so that a noisy machine hurts all of them. The fastest turns are compared, within a run
only: other work on the machine can only slow a turn down.

    python benchmarks/file_to_first_token.py --model shaped --frames 32 --write docs/overlap.md
    python benchmarks/file_to_first_token.py --device cuda --size large --frames 256 --seconds 600

The shaped model is a LLaVA-OneVision with random weights: it costs what a trained one of that size
costs, and its answers mean nothing.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import shlex
import statistics
import sys
import tempfile
from dataclasses import dataclass
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

import foveate
from foveate.core.hardware import hardware
from foveate.video import Clip, sample_clip

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
QUESTION = "what is blue ?"
#: name -> encoder (layers, width, image side), language model (layers, width, heads of 64).
SIZES = {
    "small": ((6, 256, 224), (6, 384)),
    "base": ((12, 576, 378), (16, 896)),
    "large": ((26, 1152, 378), (28, 3584)),
    # The widths of SigLIP-so400m and Qwen2-0.5B with half their depth.
    "so400m": ((13, 1152, 378), (12, 896)),
}


@dataclass(frozen=True)
class Variant:
    """One way from the file to the first token."""

    name: str
    recipe: str | None
    retain: float | None
    overlap: bool
    depth: int = 2
    encode_ahead: bool = True


VARIANTS = (
    Variant("in one go", None, None, False),
    Variant("in chunks, no threads", None, None, True, 0),
    Variant("decoding ahead", None, None, True, encode_ahead=False),
    Variant("decoding and encoding ahead", None, None, True),
    Variant("quickvideo 0.2, in chunks, no threads", "quickvideo", 0.2, True, 0),
    Variant("quickvideo 0.2, decoding ahead", "quickvideo", 0.2, True, encode_ahead=False),
    Variant("quickvideo 0.2, decoding and encoding ahead", "quickvideo", 0.2, True),
    Variant("tome 0.5, in one go", "tome@encoder", 0.5, False),
    Variant("tome 0.5, decoding and encoding ahead", "tome@encoder", 0.5, True),
)


def shaped_model(size: str, device: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """A LLaVA-OneVision of a size with random weights, and a processor that fits it."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    from foveate.checkpoints.processors import StackedFrames

    (depth, width, side), (layers, hidden) = SIZES[size]
    trained, known = foveate.embedded()
    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": width,
            "intermediate_size": 4 * width,
            "num_hidden_layers": depth,
            "num_attention_heads": width // 64,
            "image_size": side,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": hidden,
            "intermediate_size": 4 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": hidden // 64,
            "num_key_value_heads": 2,
            "vocab_size": trained.config.text_config.vocab_size,
            "max_position_embeddings": 1 << 17,
            "tie_word_embeddings": True,
        },
        image_token_index=trained.config.image_token_id,
        video_token_index=trained.config.video_token_id,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaOnevisionForConditionalGeneration(config).to(device, dtype).eval()
    processor = copy.copy(known)
    processor.num_image_tokens = (side // 14) ** 2
    processor.video_processor = StackedFrames(
        {
            "size": {"height": side, "width": side},
            "do_center_crop": False,
            "resample": 3,
            "image_mean": [0.5] * 3,
            "image_std": [0.5] * 3,
            "do_rescale": True,
            "do_normalize": True,
            "do_resize": True,
        }
    )
    return model, processor


def make_long_clip(path: Path, seconds: int) -> Path:
    """640x272 at 25 frames a second, h264: a real clip with several shots, over and over."""
    import av

    with av.open(str(sample_clip("bikes"))) as container:
        frames = [frame.reformat(format="yuv420p") for frame in container.decode(video=0)]
    with av.open(str(path), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = frames[0].width, frames[0].height, "yuv420p"
        for number in range(25 * seconds):
            frame = frames[number % len(frames)]
            frame.pts, frame.time_base, frame.pict_type = number, Fraction(1, 25), 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def run(variant: Variant, model: Any, processor: Any, path: Path, options: Any) -> dict[str, float]:
    """Seconds of every stage, and from the file to the first token."""
    from foveate.core import Budget, Recipe
    from foveate.core.timeline import Timeline
    from foveate.video.sampling import sample_ranks
    from foveate.view.overlap import open_prefill

    line = Timeline()
    if variant.overlap:
        clip = Clip(path)
        made = None if variant.recipe is None else Recipe.of(variant.recipe)
        index = sample_ranks(len(clip), min(options.frames, len(clip))).tolist()
        read = open_prefill(
            model,
            processor,
            clip,
            index,
            QUESTION,
            made,
            Budget(variant.retain),
            chunk=options.chunk,
            depth=variant.depth,
            encode_ahead=variant.encode_ahead,
            timeline=line,
            evidence=False,
        )
        with read:
            inputs = read.run().inputs
            with torch.inference_mode(), line.span("prefill"):
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
                if options.device == "cuda":
                    torch.cuda.synchronize()
        total = line.now()
    else:
        answer = foveate.ask(
            model,
            processor,
            path,
            QUESTION,
            variant.recipe,
            retain=variant.retain,
            frames=options.frames,
            max_new_tokens=1,
            overlap=False,
        )
        line, total = answer.timeline, answer.file_to_first_token
    return {**line.seconds(), "side by side": line.overlap(), "first token": total}


def measure(model: Any, processor: Any, path: Path, options: Any) -> list[dict[str, Any]]:
    """The fastest turn of every variant, and the median; variants in turn."""
    found: dict[str, list[dict[str, float]]] = {variant.name: [] for variant in VARIANTS}
    for turn in range(options.rounds + 1):
        for variant in VARIANTS:
            seconds = run(variant, model, processor, path, options)
            print(turn, variant.name, {k: round(v, 3) for k, v in seconds.items()}, flush=True)
            if turn:  # the first turn warms caches up
                found[variant.name].append(seconds)
    rows = []
    for variant in VARIANTS:
        samples = found[variant.name]
        best = min(samples, key=lambda sample: sample["first token"])
        median = statistics.median(sample["first token"] for sample in samples)
        rows.append({"variant": variant.name, **best, "median": median})
    return rows


def table(rows: list[dict[str, Any]]) -> list[str]:
    """One table in Markdown; the last column is against the first row."""
    lines = [
        "| | decode | encode | prefill | side by side | file to first token | median | "
        "of the first row |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for row in rows:
        stages = " | ".join(
            f"{row[key]:.2f} s" for key in ("decode", "encode", "prefill", "side by side")
        )
        share = row["first token"] / rows[0]["first token"]
        lines.append(
            f"| {row['variant']} | {stages} | **{row['first token']:.2f} s** | "
            f"{row['median']:.2f} s | {share:.2f} |"
        )
    return lines


def page(results: list[dict[str, Any]], options: Any) -> str:
    """What goes between the marks of the page."""
    lines = [
        f"Measured {date.today()} on {hardware(options.device)}, {platform.system()}, Python "
        f"{platform.python_version()}, torch {torch.__version__}; {options.frames} frames, chunks "
        f"of {options.chunk}; the fastest of {options.rounds} turns, and the median.",
        "",
        f"    python benchmarks/file_to_first_token.py {shlex.join(sys.argv[1:])}",
    ]
    for result in results:
        lines += ["", f"**{result['title']}**", "", *table(result["rows"])]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", nargs="+", default=["embedded", "shaped"])
    parser.add_argument("--size", choices=SIZES, default="small", help="of the shaped model")
    parser.add_argument("--clips", nargs="+", default=["bigbuckbunny", "long"])
    parser.add_argument("--seconds", type=int, default=60, help="of the generated longer clip")
    parser.add_argument("--frames", type=int, default=64)
    parser.add_argument("--chunk", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--json", type=Path, help="where the figures go as well")
    parser.add_argument("--write", type=Path, help="page whose tables are replaced")
    options = parser.parse_args()
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for kind in options.model:
            if kind == "embedded":
                model, processor = foveate.embedded(
                    device=options.device, dtype=getattr(torch, name)
                )
                words = "The embedded model"
            else:
                model, processor = shaped_model(options.size, options.device, getattr(torch, name))
                millions = sum(p.numel() for p in model.parameters()) / 1e6
                words = f"A LLaVA-OneVision of {millions:.0f} M random parameters"
            for clip in options.clips:
                path = sample_clip(clip) if clip != "long" else Path(folder) / "long.mp4"
                if clip == "long" and not path.exists():
                    make_long_clip(path, options.seconds)
                info = Clip(path).info
                title = f"{words}, {info.width}x{info.height}, {info.duration:.0f} s ({info.codec})"
                rows = measure(model, processor, path, options)
                results.append({"title": title, "rows": rows})
    text = page(results, options)
    print(text)
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        _, _, after = rest.partition(END)
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main()
