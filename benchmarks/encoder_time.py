"""Time of a vision encoder alone, untouched against an encoder-stage recipe, beside its FLOPs.

    python benchmarks/encoder_time.py --recipe tome --retain 0.7 0.4 0.2

The encoder is the embedded DINOv2-small; all variants take turns in one process, medians count.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from datetime import date

import torch

import foveate
from foveate.models.default_encoder import default_encoder


def seconds(model: torch.nn.Module, pixels: torch.Tensor) -> float:
    """Wall time of one forward pass."""
    if pixels.is_cuda:
        torch.cuda.synchronize()
    begin = time.perf_counter()
    with torch.no_grad():
        model(pixel_values=pixels)
    if pixels.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="tome")
    parser.add_argument("--retain", type=float, nargs="+", default=[0.7, 0.4, 0.2])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=378)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    model = default_encoder(device=options.device)
    generator = torch.Generator().manual_seed(0)
    shape = (options.batch, 3, options.size, options.size)
    pixels = torch.randn(shape, generator=generator).to(options.device)
    times: dict[float, list[float]] = {retain: [] for retain in (1.0, *options.retain)}
    flops = dict.fromkeys(times, 1.0)
    for turn in range(options.rounds + 1):
        for retain, samples in times.items():
            with foveate.reduce(model, options.recipe, retain=retain) as run:
                spent = seconds(model, pixels)
            if turn:  # the first turn warms caches up
                samples.append(spent)
            if run.report.flops:
                total = {name: part["total"] for name, part in run.report.flops.items()}
                flops[retain] = total["reduced"] / total["untouched"]
    untouched = statistics.median(times[1.0])
    device = torch.cuda.get_device_name() if options.device == "cuda" else platform.machine()
    print(
        f"DINOv2-small, {options.batch} x {options.size} x {options.size}, float32, {device}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {date.today().isoformat()}"
    )
    print(f"{options.recipe:<12}{'seconds':>10}{'time':>9}{'FLOPs':>9}")
    for retain, samples in times.items():
        median = statistics.median(samples)
        share = median / untouched
        print(f"{f'retain {retain}':<12}{median:>10.3f}{share:>9.1%}{flops[retain]:>9.1%}")


if __name__ == "__main__":
    main()
