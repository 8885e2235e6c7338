"""Time to first token, untouched against reduced, beside the ratio that FLOPs alone would allow.

A LLaVA-OneVision of about 0.2 B parameters with random weights reads one video. Both variants run
in turn in one process, so that a noisy machine hurts both; medians are compared.

    python benchmarks/time_to_first_token.py --recipe holitom --retain 0.15 --frames 16
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from contextlib import nullcontext
from datetime import date

import torch

import foveate

IMAGE, VIDEO = 31998, 31999


def build_model(dtype: torch.dtype, device: str) -> torch.nn.Module:
    """SigLIP-like tower (12 x 576, 729 patches) and Qwen2-like LLM (16 x 896), random weights."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 576,
            "intermediate_size": 2304,
            "num_hidden_layers": 12,
            "num_attention_heads": 9,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 2432,
            "num_hidden_layers": 16,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).to(device, dtype).eval()


def build_inputs(frames: int, dtype: torch.dtype, device: str) -> dict[str, torch.Tensor]:
    """A video whose scene changes every eight frames and drifts a little in between."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randn(-(-frames // 8), 3, 384, 384, generator=generator)
    drift = 0.02 * torch.randn(frames, 3, 384, 384, generator=generator)
    pixels = scenes.repeat_interleave(8, dim=0)[:frames] + drift
    ids = [*range(10, 30), *[VIDEO] * (frames * 14 * 14 + 1), *range(30, 60)]
    input_ids = torch.tensor([ids], device=device)
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "pixel_values_videos": pixels[None].to(device, dtype),
    }


class Stopwatch:
    """Wall time between entering and leaving a module, by hooks, synchronised on CUDA."""

    def __init__(self, module: torch.nn.Module, device: str) -> None:
        self.device = device
        self.seconds = 0.0
        self.begin = 0.0
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave)

    def _enter(self, *_: object) -> None:
        self.begin = now(self.device)

    def _leave(self, *_: object) -> None:
        self.seconds += now(self.device) - self.begin


def now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def short_prompt_seconds(model: torch.nn.Module, lengths: list[int], device: str) -> float:
    """Time of the untouched language model on prompts of these lengths, one length per layer.

    Every distinct length is timed on the whole stack and counts for the layers that have it: what
    a reduced prefill would cost if removing tokens cost nothing.
    """
    language, total = model.model.language_model, 0.0
    for length in sorted(set(lengths)):
        ids = torch.arange(10, 10 + length, device=device)[None] % 30000
        times = []
        with torch.no_grad():
            for _ in range(4):
                begin = now(device)
                language(input_ids=ids)
                times.append(now(device) - begin)
        total += statistics.median(times[1:]) * lengths.count(length) / len(lengths)
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="holitom")
    parser.add_argument("--retain", type=float, default=0.15)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default=None, help="float32 on CPU, bfloat16 on CUDA")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    name = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    dtype = getattr(torch, name)
    model = build_model(dtype, options.device)
    inputs = build_inputs(options.frames, dtype, options.device)
    vision = Stopwatch(model.model.vision_tower, options.device)
    language = Stopwatch(model.model.language_model, options.device)
    rows: dict[str, list[tuple[float, float, float]]] = {"untouched": [], "reduced": []}
    report = None
    for turn in range(options.rounds + 1):
        for variant, samples in rows.items():
            reduced = variant == "reduced"
            scope = (
                foveate.reduce(model, options.recipe, retain=options.retain)
                if reduced
                else nullcontext()
            )
            vision.seconds = language.seconds = 0.0
            with scope as run:
                begin = now(options.device)
                model.generate(**inputs, max_new_tokens=1, do_sample=False)
                total = now(options.device) - begin
            if turn:  # the first turn warms caches up
                samples.append((total, vision.seconds, language.seconds))
            if reduced:
                report = run.report
    assert report is not None
    short = short_prompt_seconds(model, report.layer_lengths[0], options.device)
    medians = {
        variant: [statistics.median(column) for column in zip(*samples, strict=True)]
        for variant, samples in rows.items()
    }
    flops = report.flops
    parts = {
        part: flops["reduced"][part] / flops["untouched"][part]
        for part in ("encoder", "prefill", "total")
    }
    full, less = medians["untouched"], medians["reduced"]
    document = {
        "recipe": report.recipe,
        "budget": report.budget,
        "frames": options.frames,
        "parameters": sum(p.numel() for p in model.parameters()),
        "visual_tokens": [report.visual_before, report.visual_after],
        "seconds": {
            variant: dict(zip(("total", "vision", "language"), row, strict=True))
            for variant, row in medians.items()
        },
        "seconds_language_at_those_lengths": short,
        "time_ratio": less[0] / full[0],
        "time_ratio_vision": less[1] / full[1],
        "time_ratio_language": less[2] / full[2],
        "flops_ratio": parts,
        "flops": flops,
        "seconds_in_methods": report.seconds,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "device": torch.cuda.get_device_name() if options.device == "cuda" else "cpu",
        "dtype": name,
        "date": date.today().isoformat(),
    }
    if options.json:
        print(json.dumps(document, indent=2))
        return
    print(
        f"{document['parameters'] / 1e6:.0f} M parameters, {options.frames} frames, {name}, "
        f"{document['device']}, {document['machine']}, {document['date']}"
    )
    print(
        f"{report.recipe}, {report.budget}: {report.visual_before} -> {report.visual_after} tokens"
    )
    print(f"{'seconds (median)':<20}{'untouched':>12}{'reduced':>12}{'time':>9}{'FLOPs':>9}")
    labels = ("time to first token", "  vision encoder", "  language model", "  everything else")
    full_row = [*full, full[0] - full[1] - full[2]]
    less_row = [*less, less[0] - less[1] - less[2]]
    shares = [parts["total"], parts["encoder"], parts["prefill"], None]
    for label, a, b, share in zip(labels, full_row, less_row, shares, strict=True):
        flop = "" if share is None else f"{share:>8.1%}"
        print(f"{label:<20}{a:>12.3f}{b:>12.3f}{b / a:>9.1%}{flop:>9}")
    print(f"untouched language model on prompts of those lengths: {short:.3f} s")
    print("in methods:", ", ".join(f"{k} {1e3 * v:.0f} ms" for k, v in report.seconds.items()))


if __name__ == "__main__":
    main()
