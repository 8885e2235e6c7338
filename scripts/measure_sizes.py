"""Print the table of docs/world.md: what clips lose that are drawn large and then made small.

python scripts/measure_sizes.py --clips 60
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from foveate.bench import WorldSuite
from foveate.bench.inputs import Prompts
from foveate.bench.plan import PlannedCell
from foveate.bench.runner import Runner
from foveate.checkpoints import load_model
from foveate.video.resize import BICUBIC, BILINEAR, BOX, LANCZOS

FILTERS = {"bicubic": BICUBIC, "box": BOX, "lanczos": LANCZOS, "bilinear": BILINEAR}
#: Pixels that clips are drawn at; the first is the model's own size, where no filter acts.
SIZES = (64, 256, 128)


def right(model: Any, processor: Any, clips: int, size: int) -> dict[str, tuple[int, int]]:
    """Right answers and questions of each task."""
    prompts = Prompts(model, processor, WorldSuite(clips, size=size), 16)
    runner = Runner(model, prompts, 32, 4, 0, 0, lambda *_: None)
    line, _ = runner.run(PlannedCell("untouched", None, 1.0))
    return {task: (correct, asked) for task, (correct, asked) in line["tasks"].items()}


def share(counts: Iterable[tuple[int, int]]) -> str:
    """The fraction that is right, in percent."""
    correct, asked = map(sum, zip(*counts, strict=True))
    return f"{correct / asked:.1%}"


def main(clips: int) -> None:
    """Measure and print."""
    model, processor = load_model("embedded")
    own = processor.video_processor.transform
    print("| Drawn at | Filter to 64 | Right | of these: reading | all others |")
    print("| --- | --- | ---: | ---: | ---: |")
    for size in SIZES:
        for name, number in FILTERS.items():
            processor.video_processor.transform = replace(own, resample=number)
            found = right(model, processor, clips, size)
            others = [counts for task, counts in found.items() if task != "reading"]
            shares = [share(found.values()), share([found["reading"]]), share(others)]
            label = "none" if size == SIZES[0] else name
            print(f"| {size} | {label} | {' | '.join(shares)} |", flush=True)
            if size == SIZES[0]:
                break


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--clips", type=int, default=60, help="clips of the test split")
    main(parser.parse_args().clips)
