"""HoliTom's outer stage against the prefill that it saves on a language model of 0.5B parameters.

    OMP_NUM_THREADS=1 python benchmarks/prefill_share.py [--layers 4] [--retain 0.15]

A randomly initialised Qwen2 of LLaVA-OneVision-0.5B's shape prefills 32 frames of 196 tokens and
then the tokens that HoliTom leaves of them. All layers cost the same, so `--layers` of the 24 are
run and the time is scaled; embeddings and the output head are left out, which favours the prefill.
The stage itself runs on features of the model's own width (896) and of a 7B model's (3584).
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2Model

sys.path.insert(0, str(Path(__file__).parent))
from test_methods import holitom, video

LAYERS, TEXT = 24, 20
#: CPU seconds of all threads: on a busy machine they vary less than wall time, least with one.
clock = time.process_time


def seconds(run: Callable[[], object], repeats: int) -> float:
    """Median time after one unmeasured run."""
    run()
    times = []
    for _ in range(repeats):
        start = clock()
        run()
        times.append(clock() - start)
    return sorted(times)[len(times) // 2]


def prefill(model: Qwen2Model, num_tokens: int, repeats: int) -> float:
    """Seconds for one prefill of `num_tokens` visual tokens and a short question."""
    x_BND = torch.randn(1, num_tokens + TEXT, model.config.hidden_size)
    return seconds(lambda: model(inputs_embeds=x_BND, use_cache=True), repeats)


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=4, help="layers that are run")
    parser.add_argument("--retain", type=float, default=0.15)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    config = Qwen2Config(
        vocab_size=8,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=options.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
    )
    model = Qwen2Model(config).eval()
    scale = LAYERS / options.layers
    stage, left = {}, 0
    for channels in (896, 3584):
        feat_TNC, attn_TN = video(channels=channels)
        left = len(holitom(feat_TNC, attn_TN, options.retain))
        run = lambda: holitom(feat_TNC, attn_TN, options.retain)  # noqa: B023, E731
        stage[channels] = seconds(run, 2 * options.repeats)
    full = prefill(model, 32 * 196, options.repeats) * scale
    short = prefill(model, left, options.repeats) * scale
    threads = torch.get_num_threads()
    print(f"CPU seconds, {threads} threads, float32, sdpa, {options.layers} of {LAYERS} layers")
    print(f"prefill of 6272 + {TEXT} tokens {full:8.3f} s")
    print(f"prefill of {left:4d} + {TEXT} tokens {short:8.3f} s")
    for channels, value in stage.items():
        share = value / (full - short)
        print(f"outer stage, {channels:4d} channels {value:8.3f} s = {share:.2%} of what it saves")


if __name__ == "__main__":
    main()
