"""Video-XL-2's block-wise prefill and rebuilt cache against the untouched language model.

    OMP_NUM_THREADS=1 python benchmarks/block_prefill.py [--frames 32] [--layers 2] [--retain 0.5]

A randomly initialised LLaVA-OneVision whose language model has the width of its 0.5B version reads
videos of 196 tokens per frame behind a vision tower too small to count. Blocks of 4 frames see 3
blocks before them. Both variants run in turn; printed are medians of the language model's time,
ratios of FLOPs and cache entries as the report counts them, and the share of its time that goes
into un-rotating, pooling and rotating keys.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import foveate

VIDEO, SIDE, TOKENS = 998, 54, 196


def build_model(layers: int) -> torch.nn.Module:
    """27 x 27 patches a frame, pooled to 14 x 14; Qwen2 of width 896."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_hidden_layers": 1,
            "num_attention_heads": 1,
            "image_size": SIDE,
            "patch_size": 2,
            "vision_use_head": False,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": layers,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 1000,
            "max_position_embeddings": 65536,
        },
        image_token_index=VIDEO - 1,
        video_token_index=VIDEO,
    )
    torch.manual_seed(0)
    return LlavaOnevisionForConditionalGeneration(config).eval()


def build_inputs(frames: int) -> dict[str, torch.Tensor]:
    """A video between 20 and 30 tokens of text; one newline token closes it."""
    ids = [*range(10, 30), *[VIDEO] * (frames * TOKENS + 1), *range(30, 60)]
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
        "pixel_values_videos": torch.randn(1, frames, 3, SIDE, SIDE, generator=generator),
    }


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--frames", type=int, nargs="+", default=[32])
    parser.add_argument("--layers", type=int, default=2, help="layers that are run")
    parser.add_argument("--retain", type=float, default=0.5)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    model = build_model(options.layers)
    language = model.get_submodule("model.language_model")
    begin, spent = [0.0, 0.0], [0.0, 0.0]
    # CPU time varies least on a busy machine; the report's own time is wall time.
    clocks = (time.process_time, time.perf_counter)

    def enter(*_: object) -> None:
        begin[:] = [clock() for clock in clocks]

    def leave(*_: object) -> None:
        spent[:] = [clock() - start for clock, start in zip(clocks, begin, strict=True)]

    print(f"CPU seconds, {torch.get_num_threads()} threads, float32, sdpa, {options.layers} layers")
    print(
        f"{'frames':>7}{'untouched':>11}{'blocks':>9}{'time':>8}{'FLOPs':>8}{'cache':>8}{'own':>9}"
    )
    for frames in options.frames:
        inputs = build_inputs(frames)
        times: dict[str, list[float]] = {"untouched": [], "blocks": []}
        own: list[float] = []
        report = None
        for turn in range(options.repeats + 1):
            for variant, samples in times.items():
                retain = options.retain if variant == "blocks" else 1.0
                with foveate.reduce(model, "video_xl2", retain=retain) as run:
                    # Around everything that the attachment does inside the language model.
                    handles = [
                        language.register_forward_pre_hook(enter, prepend=True),
                        language.register_forward_hook(leave),
                    ]
                    model(**inputs, logits_to_keep=1)
                    for handle in handles:
                        handle.remove()
                if turn:  # the first turn warms caches up
                    samples.append(spent[0])
                if variant == "blocks":
                    report = run.report
                    own.append(report.seconds["cache"] / spent[1])
        assert report is not None
        full, less = (statistics.median(samples) for samples in times.values())
        flops = report.flops["reduced"]["prefill"] / report.flops["untouched"]["prefill"]
        cache = report.cache_lengths[0][0] / report.prompt_lengths[0]
        share = statistics.median(own[1:])
        print(
            f"{frames:>7}{full:>11.2f}{less:>9.2f}{less / full:>8.1%}{flops:>8.1%}{cache:>8.1%}"
            f"{share:>9.2%}"
        )


if __name__ == "__main__":
    main()
