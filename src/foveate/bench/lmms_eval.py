"""The model `foveate` of lmms-eval: public benchmarks on any model under any recipe.

lmms-eval finds `manifest` through the entry-point group "lmms_eval.models" and asks this module for
the class `FoveateLmms`, which is made then: nothing here needs the harness before.

Source: lmms-eval 0.7.3 (`models/registry_v2.py`, `api/model.py`, `api/instance.py`).
"""

from __future__ import annotations

import functools
import importlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach import reduce
from foveate.checkpoints import Chat, prepare_chats, read_chat
from foveate.core import Budget, Recipe, Report
from foveate.errors import MissingDependencyError, RecipeError, VideoError

_LOG = logging.getLogger(__name__)
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SAMPLING = ("temperature", "top_p", "top_k")
_MAX_NEW_TOKENS = 1024


def manifest() -> Any:
    """What lmms-eval registers: the model id `foveate` and its chat class.

    Raises:
        MissingDependencyError: lmms-eval is not installed.
    """
    registry = _harness("models.registry_v2")
    return registry.ModelManifest(model_id="foveate", chat_class_path=f"{__name__}.FoveateLmms")


def __getattr__(name: str) -> Any:
    if name == "FoveateLmms":
        return _model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _harness(module: str) -> Any:
    try:
        return importlib.import_module(f"lmms_eval.{module}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f'Public benchmarks run through lmms-eval: pip install "foveate[eval]" ({error}).'
        ) from error


def read_recipe(text: Any) -> Recipe | None:
    """The recipe that a model argument of lmms-eval names; None for "untouched".

    The harness cuts its model arguments at commas, so ";" may stand for "," within the text; a text
    in quotes keeps its commas.

    Args:
        text: a recipe text, the path of a recipe's JSON file, "untouched" or "none".

    Raises:
        RecipeError: it cannot be read.
        UnknownMethodError: no method has a name in it.

    Example:
        >>> str(read_recipe("tome(r=8; retain=0.6)@encoder + holitom"))
        'tome(r=8, retain=0.6) + holitom'
        >>> read_recipe("untouched") is None
        True
    """
    named = str(text).strip()
    if len(named) > 1 and named[0] == named[-1] and named[0] in "'\"":
        named = named[1:-1].strip()
    if named.lower() in ("", "none", "untouched"):
        return None
    if named.count("(") != named.count(")"):
        raise RecipeError(
            f"The recipe arrived as {named!r}: lmms-eval cuts model arguments at commas. Write ; "
            "in place of , within a recipe, put it in quotes, or name a recipe's JSON file."
        )
    return Recipe.of(named if named.endswith(".json") else named.replace(";", ","))


@dataclass(frozen=True)
class Settings:
    """The model arguments of the harness, checked.

    Attributes:
        pretrained: folder or hub id of a checkpoint of a known family, or "embedded".
        recipe: what to do; None leaves the model untouched.
        retain: fraction of visual tokens kept, in (0, 1].
        tokens: absolute count kept per image or video instead.
        max_frames: frames taken evenly from each video.
        device: where the model runs; default: CUDA where there is one.
        dtype: of the weights; default: bfloat16, float32 on CPU.
        batch_size: most requests answered together.
        seed: for methods that draw random numbers.

    Raises:
        ValueError: a value is out of range, or a text is no recipe.

    Example:
        >>> Settings.read(pretrained="folder", recipe="divprune", retain=0.1).budget
        Budget(retain=0.1, tokens=None)
    """

    pretrained: str
    recipe: Recipe | None = None
    retain: float | None = None
    tokens: int | None = None
    max_frames: int = 32
    device: str = "cpu"
    dtype: torch.dtype | None = None
    batch_size: int = 1
    seed: int = 0

    @classmethod
    def read(cls, **arguments: Any) -> Settings:
        """Settings from what the harness parsed."""
        arguments.pop("max_batch_size", None)  # for batch sizes that the harness searches for
        names = list(cls.__dataclass_fields__)
        unknown = sorted(set(arguments) - set(names))
        if unknown or "pretrained" not in arguments:
            wrong = f"has no {', '.join(unknown)}" if unknown else "needs pretrained=CHECKPOINT"
            raise ValueError(f"The model foveate {wrong}; its arguments are {', '.join(names)}.")
        given = {name: value for name, value in arguments.items() if value is not None}
        given["pretrained"] = str(given["pretrained"])
        given["recipe"] = read_recipe(given.get("recipe", "untouched"))
        given["dtype"] = _dtype(given.get("dtype", "auto"))
        default = "cuda" if torch.cuda.is_available() else "cpu"
        given["device"] = str(given.get("device", default))
        for name in ("max_frames", "batch_size", "seed"):
            if name in given:
                given[name] = _whole(name, given[name])
        made = cls(**given)
        budget = made.budget  # checks the values, before weights are read
        if made.recipe is None and not budget.is_full:
            raise ValueError("A budget needs a recipe: add recipe=NAME, or leave the budget out.")
        return made

    @property
    def budget(self) -> Budget:
        """The budget of every request."""
        return Budget(self.retain, self.tokens)


def _dtype(name: Any) -> torch.dtype | None:
    if name in (None, "auto") or isinstance(name, torch.dtype):
        return name if isinstance(name, torch.dtype) else None
    if name not in _DTYPES:
        raise ValueError(f"dtype must be auto, {', '.join(_DTYPES)}; got {name!r}.")
    return _DTYPES[name]


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = None
    least = 0 if name == "seed" else 1
    if number is None or number != float(value) or number < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}.")
    return number


# -- answering ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reply:
    """An answer, and the tokens of its prompt before reduction and of itself."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass
class Account:
    """What a run kept and took, over all requests.

    Attributes:
        retained: per request with images or videos, the fraction of visual tokens that entered the
            language model.
        untouched: FLOPs of encoder, projector and prefill without the recipe.
        reduced: FLOPs with it; see docs/flops.md for the rule.
        seconds: spent in generation.
        new_tokens: generated.
        unreadable: requests whose image or video could not be read; their answer is empty.
    """

    retained: list[float] = field(default_factory=list)
    untouched: float = 0.0
    reduced: float = 0.0
    seconds: float = 0.0
    new_tokens: int = 0
    unreadable: int = 0

    def add(self, report: Report) -> None:
        """Count one call."""
        samples: dict[int, list[int]] = {}
        for item in report.items:
            counts = samples.setdefault(item.sample, [0, 0])
            counts[0] += item.before
            counts[1] += item.after
        self.retained += [after / max(before, 1) for before, after in samples.values()]
        if "reduced" in report.flops:
            self.untouched += report.flops["untouched"]["total"]
            self.reduced += report.flops["reduced"]["total"]

    def as_metrics(self) -> dict[str, float]:
        """The figures that the harness prints and writes beside its own, all numbers."""
        metrics: dict[str, float] = {"unreadable": self.unreadable}
        if self.retained:
            metrics["visual_tokens_retained"] = sum(self.retained) / len(self.retained)
        if self.untouched:
            metrics["flops_ratio"] = self.reduced / self.untouched
        return metrics


class Answerer:
    """Answers requests of the harness in batches, with a recipe on the model while it does.

    Args:
        model: a transformers vision-language model of a known family.
        processor: its processor.
        settings: recipe, budget, frames and batch size.
    """

    def __init__(self, model: nn.Module, processor: Any, settings: Settings) -> None:
        self.model: Any = model
        self.processor = processor
        self.settings = settings
        tokenizer = processor.tokenizer
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token

    def check(self) -> None:
        """Put the recipe on and take it off again.

        Raises:
            FoveateError: it cannot act on this model.
        """
        with self._attached():
            pass

    def _attached(self) -> Any:
        s = self.settings
        if s.recipe is None:
            return _Untouched()
        return reduce(self.model, s.recipe, retain=s.retain, tokens=s.tokens, seed=s.seed)

    def answer(
        self,
        requests: Iterable[tuple[Iterable[Mapping[str, Any]], Mapping[str, Any]]],
        on_done: Callable[[int], object] = lambda count: None,
    ) -> tuple[list[Reply], Account]:
        """Answer requests in their order; the model is clean again afterwards.

        Neighbours of one layout (images, frames) and the same generation arguments share a batch,
        so no more than one batch of frames is in memory.

        Args:
            requests: messages as `read_chat` takes them, and generation arguments; consumed lazily.
            on_done: called with the number of requests finished.

        Raises:
            FoveateError: the recipe cannot act on a call.
            ValueError: messages hold something else than text, images and videos.
        """
        account, replies = Account(), dict[int, Reply]()
        with self._attached() as run:
            for indices, chats, arguments in self._batches(requests, account):
                answered = self._generate(run, chats, arguments, account) if chats else [Reply("")]
                replies.update(zip(indices, answered, strict=True))
                on_done(len(indices))
        return [replies[index] for index in range(len(replies))], account

    def _batches(
        self, requests: Iterable[Any], account: Account
    ) -> Iterator[tuple[list[int], list[Chat], Mapping[str, Any]]]:
        """Indices, chats and generation arguments; no chats where one cannot be read."""
        indices: list[int] = []
        chats: list[Chat] = []
        shared: Mapping[str, Any] = {}
        key: Any = None
        for index, (messages, arguments) in enumerate(requests):
            try:
                chat = read_chat(messages, self.settings.max_frames)
            except VideoError as error:
                _LOG.warning("request %d gets an empty answer: %s", index, error)
                account.unreadable += 1
                yield [index], [], arguments
                continue
            its_key = chat.layout, json.dumps(arguments, sort_keys=True, default=str)
            if chats and (its_key != key or len(chats) == self.settings.batch_size):
                yield indices, chats, shared
                indices, chats = [], []
            indices.append(index)
            chats.append(chat)
            key, shared = its_key, arguments
        if chats:
            yield indices, chats, shared

    def _generate(
        self, run: Any, chats: list[Chat], arguments: Mapping[str, Any], account: Account
    ) -> list[Reply]:
        like = next(self.model.parameters())
        inputs = {
            name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
            for name, value in prepare_chats(self.processor, chats).items()
        }
        earlier = run.report
        begin = time.perf_counter()
        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                **generation_arguments(arguments),
                pad_token_id=self.processor.tokenizer.pad_token_id,
            )
        new = ids[:, inputs["input_ids"].shape[1] :]
        lengths = self._lengths(new)
        account.seconds += time.perf_counter() - begin
        account.new_tokens += sum(lengths)
        if run.report is not earlier:  # a call without images and videos reports nothing
            account.add(run.report)
        texts = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        prompts = inputs["attention_mask"].sum(dim=1).tolist()
        stops = stop_texts(arguments)
        return [
            Reply(cut_at(text.strip(), stops), prompt, length)
            for text, prompt, length in zip(texts, prompts, lengths, strict=True)
        ]

    def _lengths(self, new_BN: Tensor) -> list[int]:
        """Tokens of each answer, the one that ends it included."""
        ends = self.model.generation_config.eos_token_id
        if ends is None:
            return [new_BN.shape[1]] * len(new_BN)
        is_end = torch.isin(new_BN, torch.tensor(ends, device=new_BN.device))
        past_end = is_end.cumsum(dim=1) - is_end.int()
        return (past_end == 0).sum(dim=1).tolist()


class _Untouched:
    """Stands in for an attachment where there is no recipe."""

    report = Report()

    def __enter__(self) -> _Untouched:
        return self

    def __exit__(self, *error: object) -> None:
        return None


def generation_arguments(given: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of `model.generate` for those of a task.

    Sampling is on where the task says so, or names a temperature above 0 and does not say. What
    concerns neither length nor choice of tokens (such as image settings of other models) is left
    out.

    Example:
        >>> generation_arguments({"max_new_tokens": 16, "temperature": 0.5, "until": ["."]})
        {'max_new_tokens': 16, 'do_sample': True, 'temperature': 0.5}
    """
    temperature = given.get("temperature")
    wanted = given.get("do_sample")
    sample = bool(temperature) if wanted is None else bool(wanted) and temperature != 0
    length = given.get("max_new_tokens", given.get("max_gen_toks", _MAX_NEW_TOKENS))
    made: dict[str, Any] = {"max_new_tokens": int(length), "do_sample": sample}
    # None overrides what the checkpoint's own generation settings say.
    made |= {name: given.get(name) if sample else None for name in _SAMPLING}
    if sample:
        made = {name: value for name, value in made.items() if value is not None}
    return made | {name: given[name] for name in ("num_beams", "min_new_tokens") if given.get(name)}


def stop_texts(given: Mapping[str, Any]) -> list[str]:
    """The texts at which an answer ends: "until" of a task, one text or a list.

    Example:
        >>> stop_texts({"until": "."}), stop_texts({})
        (['.'], [])
    """
    until = given.get("until") or []
    return [text for text in ([until] if isinstance(until, str) else until) if text]


def cut_at(text: str, stops: Iterable[str]) -> str:
    r"""The text before the first of the stops.

    Example:
        >>> cut_at("a bike\n\nQuestion", ["\n\n", "?"])
        'a bike'
    """
    return text[: min([len(text), *(i for i in map(text.find, stops) if i >= 0)])]


# -- the harness ----------------------------------------------------------------------------------


@functools.cache
def _model_class() -> type:
    """The class that lmms-eval instantiates."""
    from foveate.checkpoints import load_model

    base: Any = _harness("api.model").lmms
    instances = _harness("api.instance")

    class FoveateLmms(base):
        """A checkpoint of a known family under a recipe; `Settings` lists the model arguments."""

        is_simple = False

        def __init__(self, **arguments: Any) -> None:
            super().__init__()
            settings = Settings.read(**arguments)
            device = self._join_processes(settings.device)
            model, processor = load_model(settings.pretrained, device=device, dtype=settings.dtype)
            self.answerer: Answerer | None = Answerer(model, processor, settings)
            self.answerer.check()
            self.settings = settings
            self._device = torch.device(device)

        @classmethod
        def create_from_arg_string(
            cls, arg_string: str, additional_config: dict[str, Any] | None = None
        ) -> FoveateLmms:
            """As in the base class, but what the string names wins over the command's defaults."""
            given = _harness("utils").simple_parse_args_string(arg_string)
            rest = {k: v for k, v in (additional_config or {}).items() if v is not None}
            return cls(**{**rest, **given})

        def _join_processes(self, device: str) -> str:
            """One process of several has its own part of the requests, and its own GPU."""
            if int(os.environ.get("WORLD_SIZE", "1")) == 1:
                return device
            self.accelerator = importlib.import_module("accelerate").Accelerator()
            self._rank = self.accelerator.process_index
            self._world_size = self.accelerator.num_processes
            return f"cuda:{self.accelerator.local_process_index}" if device == "cuda" else device

        @property
        def device(self) -> torch.device:
            return self._device

        @property
        def batch_size(self) -> int:
            return self.settings.batch_size

        def generate_until(self, requests: list[Any]) -> list[Any]:
            """Answer the requests; each has the arguments (context, doc_to_messages, generation
            arguments, document number, task, split)."""
            from tqdm import tqdm

            if self.answerer is None:
                raise RuntimeError("This model was cleaned up; make a new one.")
            with tqdm(total=len(requests), disable=self.rank != 0, desc="foveate") as bar:
                replies, account = self.answerer.answer(map(self._read, requests), bar.update)
            for request, reply in zip(requests, replies, strict=True):
                self.cache_hook.add_partial(
                    "generate_until", (request.args[0], request.args[2]), reply.text
                )
            speed = account.new_tokens / account.seconds if account.seconds else 0.0
            _harness("models.model_utils.gen_metrics").log_metrics(
                total_elapsed_time=account.seconds,
                total_gen_tokens=account.new_tokens,
                avg_speed=speed,
                additional_metrics={"total_requests": len(requests), **account.as_metrics()},
            )
            return [
                instances.GenerationResult(
                    text=reply.text,
                    token_counts=instances.TokenCounts(reply.input_tokens, reply.output_tokens),
                )
                for reply in replies
            ]

        def _read(self, request: Any) -> tuple[Any, Mapping[str, Any]]:
            _, doc_to_messages, arguments, doc_id, task, split = request.args
            return doc_to_messages(self.task_dict[task][split][doc_id]), arguments or {}

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError(
                "The model foveate answers by generating text and gives no likelihoods; choose "
                "tasks with output_type: generate_until."
            )

        def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
            raise NotImplementedError(
                "The model foveate answers in one round; choose tasks with output_type: "
                "generate_until."
            )

        def clean(self) -> None:
            """Let the weights go: the harness is about to score, perhaps with another model."""
            self.answerer = None
            super().clean()

    FoveateLmms.__module__ = __name__
    FoveateLmms.__qualname__ = "FoveateLmms"
    return FoveateLmms
