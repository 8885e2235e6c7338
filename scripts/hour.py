"""Print the tables of docs/long-videos.md: needles that are found, and an hour-long file.

    python scripts/hour.py needles --clips 40
    python scripts/hour.py file --folder hour

`needles` asks about generated clips in memory, one event of two seconds each, frames by frames
chosen for the question. `file` writes a file of an hour (once) and asks about its three events
with `foveate ask`, each in a process of its own whose memory the system counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from foveate.core.hardware import hardware

#: Recipes that choose frames, and what is asked without any.
RECIPES = (
    "uniform",
    "quota",
    "f2c@frames",
    "f2c(anchors=4)@frames",
    "quota(base=1000)@frames",
)
SCORERS: dict[str, dict[str, Any]] = {
    "default": {},
    "all 8 times": {"shortlist": 1.0},
    "all once": {"repeat": 1},
    "windows of 4, twice": {"window": 4, "repeat": 2, "shortlist": 1.0},
}


def machine() -> str:
    """Processor and date, for the line under a table."""
    return f"{hardware('cpu')}; {datetime.now(UTC).date().isoformat()}"


# -- needles --------------------------------------------------------------------------------------


def needles(clips: int, seconds: float, first: int, recipes: list[str], chosen: str) -> None:
    """How often a needle is among 16 frames, and answered."""
    import torch

    import foveate
    from foveate.bench import wilson
    from foveate.video import Clip
    from foveate.view import ask
    from foveate.world.long import LongWorld

    torch.set_num_threads(1)
    model, processor = foveate.embedded()
    scorer = foveate.AnsweringScorer(model, processor, **SCORERS[chosen])
    world = LongWorld(seconds, fps=2.0)
    found, right = dict.fromkeys(recipes, 0), dict.fromkeys(recipes, 0)
    looked, spent = 0, 0.0
    for number in range(first, first + clips):
        clip = world.sample(number)
        (event,) = clip.events
        pixels = torch.cat([torch.from_numpy(part) for part in clip.chunks()])
        shown = Clip(pixels.permute(0, 3, 1, 2), fps=clip.fps)
        for recipe in recipes:
            told: dict[str, int] = {}
            answer = ask(
                model,
                processor,
                shown,
                event.question.text,
                None if recipe == "uniform" else recipe,
                scorer=scorer,
                progress=lambda stage, done, total, told=told: told.update({stage: total}),
            )
            items = answer.report.items
            times = items[0].seconds if items else None
            times = times or shown.sample(16).seconds.tolist()
            found[recipe] += any(event.start <= at < event.stop for at in times)
            right[recipe] += answer.text == event.question.answer
            if told.get("choose", 0) >= seconds:  # Others ask again about the same frames.
                looked += told["choose"]
                spent += answer.timeline.seconds()["choose"]
    for recipe in recipes:
        cells = " | ".join(str(wilson(count[recipe], clips)) for count in (found, right))
        print(f"| {seconds:g} s | `{recipe}` | {cells} |", flush=True)
    if looked:
        print(f"{chosen}: {1e3 * spent / looked:.1f} ms per frame looked at; {machine()}")


# -- an hour --------------------------------------------------------------------------------------


def write(path: Path, minutes: float, fps: float) -> None:
    """A file of so many minutes with three events, 640 x 360, H.264; once."""
    from foveate.world.long import LongWorld
    from foveate.world.long_files import write_one

    if path.exists():
        return
    begin = time.perf_counter()
    clip = LongWorld(60 * minutes, fps=fps, events=3).sample(0)
    write_one(clip, path, size=(360, 640))
    size = path.stat().st_size / 2**20
    print(f"wrote {clip.frames:,} frames, {size:.0f} MiB, in {time.perf_counter() - begin:.0f} s")


def asked(arguments: list[str]) -> tuple[dict[str, Any], float, float]:
    """What `foveate ask` says; its most resident memory in GiB, and its seconds in all."""
    begin = time.perf_counter()
    child = subprocess.Popen(
        [sys.executable, "-m", "foveate", "ask", *arguments, "--json"], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    text = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"foveate ask {' '.join(arguments)} ended with {child.returncode}")
    # Kilobytes, but for macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return json.loads(text), usage.ru_maxrss * unit / 2**30, time.perf_counter() - begin


STAGES = ("choose", "decode", "encode", "prefill", "answer")


def hour(folder: Path, minutes: float, fps: float, recipes: list[str], extra: list[str]) -> None:
    """Ask about every event of the file under every recipe."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{minutes:g}-minutes-{fps:g}-fps.mp4"
    write(path, minutes, fps)
    rows = [json.loads(line) for line in path.with_suffix(".jsonl").read_text().splitlines()]
    for row in rows:
        for recipe in recipes:
            # Even frames, and nothing taken away.
            named = ["uniform", "--retain", "1"] if recipe == "uniform" else [recipe]
            arguments = [str(path), row["question"], "--recipe", *named, *extra]
            got, memory, total = asked(arguments)
            times = got["frames"]["seconds"] or even(path, got["frames"]["shown"])
            found = [at for at in times if row["start"] <= at < row["stop"]]
            seconds = got["timeline"]["seconds"]
            cells = [
                row["question"],
                f"`{recipe}`",
                "yes" if found else "no",
                f"{got['answer']} ({'right' if got['answer'] == row['answer'] else 'wrong'})",
                f"{got['frames']['looked_at']:,}",
                str(got["frames"]["shown"]),
                *(f"{seconds.get(stage, 0.0):.2f}" for stage in STAGES),
                f"{total:.0f}",
                f"{memory:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)
    if any(recipe != "uniform" for recipe in recipes):
        print(f"the frames of every second, decoded to 64 x 64 alone: {decoded(path):.1f} s")
    print(machine())


def even(path: Path, frames: int) -> list[float]:
    """When even frames are shown; a model to which nothing was done has no report that says it."""
    from foveate.video import Clip
    from foveate.video.sampling import sample_ranks

    clip = Clip(path)
    return clip.seconds[sample_ranks(len(clip), frames)].tolist()


def decoded(path: Path) -> float:
    """Seconds that a frame per second takes to decode, nothing else done."""
    from foveate.video import Clip

    clip, begin = Clip(path), time.perf_counter()
    with clip.stream(fps=1.0, chunk=64, ahead=1, size=(64, 64)) as stream:
        for _ in stream:
            pass
    return time.perf_counter() - begin


def main() -> None:
    """Read the options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    kinds = parser.add_subparsers(dest="kind", required=True)
    small = kinds.add_parser("needles")
    small.add_argument("--clips", type=int, default=40)
    small.add_argument("--first", type=int, default=0)
    small.add_argument("--seconds", type=float, nargs="+", default=[60.0, 300.0])
    small.add_argument("--recipes", nargs="+", default=list(RECIPES))
    small.add_argument("--scorer", default="default", choices=SCORERS)
    large = kinds.add_parser("file")
    large.add_argument("--folder", type=Path, default=Path("hour"))
    large.add_argument("--minutes", type=float, default=60.0)
    large.add_argument("--fps", type=float, default=25.0)
    large.add_argument("--recipes", nargs="+", default=["uniform", "f2c@frames"])
    large.add_argument("--extra", nargs="*", default=[], help="further options of foveate ask")
    given = parser.parse_args()
    if given.kind == "needles":
        for seconds in given.seconds:
            needles(given.clips, seconds, given.first, given.recipes, given.scorer)
    else:
        hour(given.folder, given.minutes, given.fps, given.recipes, given.extra)


if __name__ == "__main__":
    main()
