"""Print the table of docs/longer-videos.md: the embedded model on longer clips than it knows.

    python scripts/longer_videos.py --clips 40

Every question is asked twice: with the clip, in one prompt, and behind it, when the clip's keys and
values are in the cache already, as in a second turn. Only then are stored keys read by more than
the last words of an answer.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from contextlib import nullcontext
from typing import Any

import torch

import foveate
from foveate.bench import WorldSuite, is_correct, wilson
from foveate.bench.generation import Generator
from foveate.bench.inputs import Prompt, Prompts


def recipes(window: int) -> dict[str, str | None]:
    """What is compared; the window is what the model was trained on."""
    stretch = f"window={window}, answer=8"
    return {
        "untouched": None,
        "stretched": f"intp({stretch})@decoder",
        "2-bit cache": "intp@cache",
        "2-bit cache, nothing recent": "intp(recent=0)@cache",
        "both": f"intp({stretch})",
    }


def equal_lengths(prompts: list[Prompt], size: int) -> list[list[Prompt]]:
    """Batches without padding."""
    groups: dict[int, list[Prompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.length].append(prompt)
    return [g[start : start + size] for g in groups.values() for start in range(0, len(g), size)]


def ask(generator: Generator, batch: list[Prompt], later: bool, tokens: int) -> list[str]:
    """Replies to a batch, the question in the clip's prompt or behind its cache."""
    inputs: dict[str, Any] = generator.prompts.collate(batch)
    ids, clips = inputs["input_ids"], [prompt.item.clip_id for prompt in batch]
    if later:
        is_visual = torch.isin(ids[0], torch.tensor(generator.prompts.placeholders))
        stop = int(is_visual.nonzero()[-1]) + 1
        first = {**inputs, "input_ids": ids[:, :stop]}
        first["attention_mask"] = inputs["attention_mask"][:, :stop]
        with torch.inference_mode(), generator.shared.over(clips):
            cache = generator.model(**first).past_key_values
        kept = ("input_ids", "attention_mask")
        inputs = {name: inputs[name] for name in kept} | {"past_key_values": cache}
    with generator.shared.over(clips):
        out = generator.generate(inputs, tokens)
    decode = generator.prompts.processor.tokenizer.decode
    return [decode(row, skip_special_tokens=True).strip() for row in out[:, ids.shape[1] :]]


def main(clips: int, lengths: list[int], window: int, chosen: list[str], once: bool) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    model, processor = foveate.embedded()
    model.float().eval()
    for frames in lengths:
        prompts = Prompts(model, processor, WorldSuite(clips=clips, frames=frames), frames)
        generator = Generator(model, prompts, prompts.longest_answer)
        batches, total = equal_lengths(prompts.prompts, 16), len(prompts.prompts)
        tokens = max(prompt.visual_tokens for prompt in prompts.prompts)
        longest = max(prompt.length for prompt in prompts.prompts)
        print(f"{frames} frames: {total:,} questions, {tokens} visual tokens, prompts to {longest}")
        for name, recipe in recipes(window).items():
            cells = []
            if name not in chosen:
                continue
            for later in (False,) if once else (False, True):
                run: Any = nullcontext() if recipe is None else foveate.reduce(model, recipe)
                right = 0
                with run:
                    for batch in batches:
                        replies = ask(generator, batch, later, prompts.longest_answer)
                        right += sum(
                            is_correct(reply, p.item.answer, p.item.options)
                            for p, reply in zip(batch, replies, strict=True)
                        )
                cells.append(str(wilson(right, total)))
            print(f"| {frames} | {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=40)
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 32, 64])
    parser.add_argument("--window", type=int, default=272, help="positions of 16 frames")
    parser.add_argument("--recipes", nargs="+", default=list(recipes(1)), choices=recipes(1))
    parser.add_argument("--once", action="store_true", help="only questions in one prompt")
    given = parser.parse_args()
    main(given.clips, given.frames, given.window, given.recipes, given.once)
