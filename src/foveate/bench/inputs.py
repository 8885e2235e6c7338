"""From questions to padded batches of model inputs, the same ones for every cell.

Legend: B samples of a batch, L padded prompt length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach.frame_choice import plan_frames
from foveate.bench.matching import offer, reads_letters
from foveate.bench.model import language_adapter
from foveate.bench.suite import Item, Suite
from foveate.checkpoints import open_clip, prepare, sample_frames
from foveate.core import FramePlan, Recipe
from foveate.errors import DamagedVideoWarning, FoveateError
from foveate.models.scorer import Scorer
from foveate.video import Clip, Frames

#: Pixels kept from one cell to the next, in bytes.
CACHE_BYTES = 2 << 30
#: Clips that stay open with what a scorer saw of them.
OPEN_CLIPS = 16
_NOT_FOR_MODELS = ("batch_num_images",)


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question ready for the model, without its pixels.

    Attributes:
        item: the question.
        sequences: int64 [1, L] tensors by name: ids, mask, token kinds.
        visual_shapes: name -> shape of everything else; equal ones share a batch.
        visual_tokens: placeholders in the prompt, that is tokens before any reduction.
        ranks: of the frames that were chosen for this question; None: they lie evenly.
        plan: why these, where a method chose them.
    """

    item: Item
    sequences: Mapping[str, Tensor]
    visual_shapes: tuple[tuple[str, tuple[int, ...]], ...]
    visual_tokens: int
    ranks: tuple[int, ...] | None = None
    plan: FramePlan | None = None

    @property
    def visual_key(self) -> tuple[str, tuple[int, ...] | None]:
        """Equal where the pixels are: clip and frames."""
        return self.item.clip_id, self.ranks

    @property
    def length(self) -> int:
        """Tokens of the prompt, text included."""
        return int(self.sequences["input_ids"].shape[1])


class Prompts:
    """All questions of a suite as model inputs.

    Every clip is decoded once; its preprocessed pixels stay in memory while they fit into
    `cache_bytes`, and those of the clips beyond it are made anew in every cell (an eviction rule
    would help nothing: every cell goes over the clips in the same order). Clips that do not decode
    are added to `suite.errors` and left out. Recipes that choose frames have prompts of their own,
    see `chosen`.

    Args:
        model: the model, for its device, dtype and placeholder tokens.
        processor: its processor.
        suite: the questions.
        frames: frames taken evenly from every clip, at most all.
        cache_bytes: most memory for pixels.
        scorer: of recipes that choose frames by the question.
        progress: called with (clips done, questions so far).

    Attributes:
        suite: where the questions come from.
        lettered: whether options are offered with letters: where the suite wants it and the
            tokenizer knows the words.
        prompts: the questions, those of one clip next to each other.
        damaged: what was lost of clips that decode in part, one line each.

    Raises:
        FoveateError: the model takes no such input.
        ValueError: no question is left, or two have the same id.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Any,
        suite: Suite,
        frames: int,
        *,
        cache_bytes: int = CACHE_BYTES,
        scorer: Scorer | None = None,
        progress: Callable[[int, int], None] = lambda clips, items: None,
    ) -> None:
        self.processor, self.frames, self.cache_bytes = processor, frames, cache_bytes
        self.scorer = scorer
        parameter = next(model.parameters())
        self.device, self.dtype = parameter.device, parameter.dtype
        self.suite = suite
        self.lettered = suite.lettered and reads_letters(processor.tokenizer)
        self.placeholders = list(language_adapter(model).placeholder_ids(model).values())
        self.pad = _pad_token(processor.tokenizer)
        self.prompts: list[Prompt] = []
        self.damaged: list[str] = []
        self._kept: dict[Any, dict[str, Tensor]] = {}
        self._bytes = 0
        self._clips: dict[str, Clip] = {}
        self._latest: tuple[str, Clip] | None = None
        for number, items in enumerate(_by_clip(suite), 1):
            self._read_clip(items, suite)
            progress(number, len(self.prompts))
        if not self.prompts:
            problems = "; ".join(suite.errors[:5]) or "the suite is empty"
            raise ValueError(f"no question of {suite.name} can be asked: {problems}.")

    def _read_clip(self, items: Sequence[Item], suite: Suite) -> None:
        try:
            taken = sample_frames(open_clip(items[0].video), self.frames)
        except (FoveateError, OSError) as error:
            suite.errors += [f"{item.where or item.id}: {error}" for item in items]
            return
        if taken.damage:
            self.damaged.append(f"{items[0].clip_id}: {taken.damage.reason}")
        for position, item in enumerate(items):
            sequences, visual = self.split(taken, item)
            self.prompts.append(self._prompt(item, sequences, visual))
            if position == 0:
                self._keep(self.prompts[-1], visual)

    def clip(self, item: Item) -> Clip:
        """The clip of a question; the first ones stay open, with what a scorer saw of them.

        Every cell goes over the clips in the same order: keeping the last ones would help nothing.
        """
        name = item.clip_id
        if name in self._clips:
            return self._clips[name]
        if self._latest is None or self._latest[0] != name:
            self._latest = name, open_clip(item.video)
        if len(self._clips) < OPEN_CLIPS:
            self._clips[name] = self._latest[1]
        return self._latest[1]

    def chosen(
        self,
        recipe: Recipe,
        retain: float,
        seed: int = 0,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Prompt]:
        """The questions with the frames that a recipe chooses for each.

        What the scorer saw of a clip serves all cells; frames are chosen anew in each.

        Args:
            recipe: one of its methods acts at the frames stage.
            retain: fraction of visual tokens kept by the whole recipe.
            seed: for methods that draw at random.
            progress: called with questions done and questions in all.

        Raises:
            MissingSignalError: the method needs a scorer.
            FoveateError: a clip cannot be read any more.
        """
        self._forget_chosen()
        found = []
        for number, base in enumerate(self.prompts, 1):
            item, clip = base.item, self.clip(base.item)
            index_K, plan = self.choose(clip, item, recipe, retain, seed)
            if plan is None:
                found.append(base)
            else:
                ranks = tuple(index_K.tolist())
                sequences, visual = self.split(taken_frames(clip, ranks, self.frames), item)
                prompt = replace(self._prompt(item, sequences, visual), ranks=ranks, plan=plan)
                if prompt.visual_key not in self._kept:
                    self._keep(prompt, visual)
                found.append(prompt)
            progress(number, len(self.prompts))
        return found

    def choose(
        self, clip: Clip, item: Item, recipe: Recipe, retain: float, seed: int = 0
    ) -> tuple[Tensor, FramePlan | None]:
        """Ranks of the frames that a recipe chooses for one question, int64 [K], and the plan."""
        return plan_frames(
            clip, recipe, item.question, self.frames, scorer=self.scorer, retain=retain, seed=seed
        )

    def _forget_chosen(self) -> None:
        """Make room: frames that were chosen in an earlier cell."""
        for key in [key for key in self._kept if key[1] is not None]:
            self._bytes -= sum(value.nbytes for value in self._kept.pop(key).values())

    def split(self, taken: Any, item: Item) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Inputs of one question about these frames: sequences, and everything else."""
        text = offer(item.question, item.options) if self.lettered and item.options else None
        found = prepare(self.processor, taken, text or item.question, is_image=len(taken) == 1)
        inputs = {
            name: value
            for name, value in found.items()
            if isinstance(value, Tensor) and name not in _NOT_FOR_MODELS
        }
        shape = inputs["input_ids"].shape
        sequences = {name: value for name, value in inputs.items() if value.shape == shape}
        sequences.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        visual = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in inputs.items()
            if name not in sequences
        }
        return sequences, visual

    def _prompt(
        self, item: Item, sequences: dict[str, Tensor], visual: dict[str, Tensor]
    ) -> Prompt:
        ids = sequences["input_ids"]
        tokens = int(torch.isin(ids, torch.tensor(self.placeholders)).sum())
        shapes = tuple(sorted((name, tuple(value.shape)) for name, value in visual.items()))
        return Prompt(item, sequences, shapes, tokens)

    def _keep(self, prompt: Prompt, visual: dict[str, Tensor]) -> None:
        size = sum(value.nbytes for value in visual.values())
        if self._bytes + size <= self.cache_bytes:
            self._kept[prompt.visual_key] = visual
            self._bytes += size

    def _visual(self, prompt: Prompt) -> dict[str, Tensor]:
        kept = self._kept.get(prompt.visual_key)
        if kept is not None:
            return kept
        clip = self._clips.get(prompt.item.clip_id) or open_clip(prompt.item.video)
        return self.split(taken_frames(clip, prompt.ranks, self.frames), prompt.item)[1]

    @property
    def longest_answer(self) -> int:
        """Tokens of the longest option or answer."""
        texts = {text for p in self.prompts for text in (p.item.answer, *p.item.options)}
        encode = self.processor.tokenizer.encode
        return max(len(encode(text, add_special_tokens=False)) for text in texts)

    def batches(self, size: int, prompts: Sequence[Prompt] | None = None) -> list[list[Prompt]]:
        """Prompts in batches of at most `size`, equal shapes together, in the order of clips.

        Args:
            size: of a batch.
            prompts: what `chosen` gave; None: those with evenly spaced frames.
        """
        groups: dict[Any, list[Prompt]] = {}
        for prompt in self.prompts if prompts is None else prompts:
            groups.setdefault(prompt.visual_shapes, []).append(prompt)
        found = []
        for group in groups.values():
            found += [group[start : start + size] for start in range(0, len(group), size)]
        return found

    def collate(self, batch: Sequence[Prompt]) -> dict[str, Tensor]:
        """Model inputs on the model's device, prompts padded on the left."""
        longest = max(prompt.length for prompt in batch)
        inputs: dict[str, Tensor] = {}
        for name in batch[0].sequences:
            fill = self.pad if name == "input_ids" else 0
            rows = [prompt.sequences[name] for prompt in batch]
            inputs[name] = torch.cat(
                [nn.functional.pad(row, (longest - row.shape[1], 0), value=fill) for row in rows]
            ).to(self.device)
        # Questions about one clip follow each other, so it is read once even when it is not kept.
        visuals: dict[Any, dict[str, Tensor]] = {}
        for prompt in batch:
            if prompt.visual_key not in visuals:
                visuals[prompt.visual_key] = self._visual(prompt)
        for name, _ in batch[0].visual_shapes:
            parts = [visuals[prompt.visual_key][name] for prompt in batch]
            inputs[name] = torch.cat(parts).to(self.device)
        return inputs


def taken_frames(clip: Clip, ranks: Sequence[int] | None, frames: int) -> Frames:
    """Frames by rank, or so many evenly; damage is recorded, not warned of."""
    if ranks is None:
        return sample_frames(clip, frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DamagedVideoWarning)
        return clip.take(ranks)


def _by_clip(suite: Iterable[Item]) -> Iterator[list[Item]]:
    """The items of every clip together, clips in the order of their first question."""
    clips: dict[str, list[Item]] = {}
    taken: set[str] = set()
    for item in suite:
        if item.id in taken:
            raise ValueError(f"two questions have the id {item.id!r}.")
        taken.add(item.id)
        clips.setdefault(item.clip_id, []).append(item)
    return iter(clips.values())


def _pad_token(tokenizer: Any) -> int:
    """Any token will do, since padding is masked; a named one keeps decoded text clean."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return token
    return 0
