"""Print the table of docs/world.md: what can be guessed without watching.

python scripts/measure_world.py --clips 8000
"""

from __future__ import annotations

import argparse
from collections import Counter

from foveate.world import TASKS, TEMPORAL_TASKS, Question, Scene, questions_of, sample_scene
from foveate.world.baselines import (
    blind_accuracy,
    glimpses,
    guess_accuracy,
    single_frame_accuracy,
)


def scenes(split: str, clips: int) -> list[Scene]:
    """The scenes that `World(split=split)` draws."""
    return [sample_scene(f"0/{split}/{index}", 16) for index in range(clips)]


def asked(found: list[Scene]) -> list[Question]:
    """All questions about these."""
    return [question for scene in found for question in questions_of(scene)]


def main(clips: int) -> None:
    """Fit the baselines on so many clips of the train split, score them on as many of test."""
    train, test = scenes("train", clips), scenes("test", clips)
    questions = asked(test)
    count = Counter(question.task for question in questions)
    chance: Counter[str] = Counter()
    for question in questions:
        chance[question.task] += question.chance  # pyright: ignore[reportArgumentType]
    blind = blind_accuracy(asked(train), questions)
    seen = glimpses(train), glimpses(test)
    guess, oracle = guess_accuracy(*seen), single_frame_accuracy(*seen)
    print("| Task | Questions | Chance | Blind | Guess after one frame | Oracle of one frame |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for task in TASKS:
        figures = [chance[task] / count[task], blind[task]]
        cells = [f"{figure:.1%}" for figure in figures]
        if task in TEMPORAL_TASKS:
            cells += [f"{guess[task]:.1%}", f"{oracle[task]:.1%}"]
        else:
            cells += ["", ""]
        print(f"| {task} | {count[task]:,} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=8000, help="of each split")
    main(parser.parse_args().clips)
