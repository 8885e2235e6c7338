"""Shared by the suite: cached tiny models, batches of every shape, and what enters the text model.

Legend: B samples, L padded tokens, S tokens of a sample, N tokens of an item, D channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import pytest
import torch
from method_table import METHOD_TABLE, WITH_VIDEOS
from torch import nn

import foveate
from foveate.models.registry import adapter_for
from tiny import TINY_FAMILIES, Sample, tiny_inputs, tiny_modalities, tiny_model

ALL = TINY_FAMILIES
#: What `make test-fast` runs: newlines and two modalities; M-RoPE, deepstack and packed rows.
QUICK = ("llava_onevision", "qwen3_vl")
TOLERANCE = 2e-5


@lru_cache
def _model(family: str, dtype: torch.dtype, attn: str) -> nn.Module:
    return tiny_model(family, dtype=dtype, attn=attn)


def model_of(family: str, dtype: torch.dtype = torch.float32, attn: str = "sdpa") -> nn.Module:
    """One model per configuration for the whole process; a leftover hook would show elsewhere."""
    return _model(family, dtype, attn)


def samples_of(family: str) -> tuple[Sample, ...]:
    """Unequal counts, several items, image and video in one sample, a text-only row."""
    two = ("video", "image") if family in WITH_VIDEOS else ("image", "image")
    one = tiny_modalities(family)[-1]
    return (
        Sample(text=(5, 7), items=(one,), seed=0),
        Sample(text=(3, 2, 9), items=two, seed=1),
        Sample(text=(11,), items=(), seed=2),
    )


@lru_cache
def batch_of(family: str, padding_side: str = "left") -> dict[str, torch.Tensor]:
    return tiny_inputs(family, samples=samples_of(family), padding_side=padding_side)


@lru_cache
def one_of(family: str, index: int = 0) -> dict[str, torch.Tensor]:
    return tiny_inputs(family, samples=(samples_of(family)[index],))


def behaviour(
    title: str, *, quick: tuple[str, ...] = QUICK[:1], **wanted: Any
) -> Callable[[Callable], Callable]:
    """Run a test for every method on every family it is for; the property is a row of the matrix.

    Cases beyond the `quick` families have the marker `matrix`, except for one family of a method
    that runs on none of them.

    Args:
        title: of the property, in docs/compatibility.md.
        quick: families that a developer waits for.
        wanted: fields of the table's rows, such as `reduces=True`.
    """
    found = []
    for name, row in METHOD_TABLE.items():
        if any(getattr(row, field) != value for field, value in wanted.items()):
            continue
        fast = [family for family in quick if family in row.families] or row.families[:1]
        found += [
            pytest.param(name, family, marks=() if family in fast else pytest.mark.matrix)
            for family in row.families
        ]
    return _recorded(title, found)


def elsewhere(title: str) -> Callable[[Callable], Callable]:
    """Run a test for every method on every family that its row leaves out."""
    found = [
        pytest.param(name, family)
        for name, row in METHOD_TABLE.items()
        for family in ALL
        if family not in row.families
    ]
    return _recorded(title, found)


def _recorded(title: str, found: list[Any]) -> Callable[[Callable], Callable]:
    def decorate(test: Callable) -> Callable:
        marked = pytest.mark.behaviour(title)(test)
        return pytest.mark.parametrize(("name", "family"), found)(marked)

    return decorate


def attach(name: str, model: nn.Module, **options: Any) -> foveate.Attachment:
    row = METHOD_TABLE[name]
    if row.reduces and not {"retain", "tokens"} & set(options):
        options["retain"] = row.retain
    return foveate.reduce(model, row.recipe, **row.arguments(), **options)


def chosen(run: foveate.Attachment) -> list[set[int]]:
    """The tokens of every item that are left, or stand for what is left."""
    return [
        set(range(item.before))
        if item.reduction is None
        else set(item.reduction.anchor_BM[0].tolist())
        for item in run.report.items
    ]


def greedy(model: nn.Module, inputs: dict[str, Any], num: int = 4, **settings: Any) -> Any:
    settings = {"do_sample": False, "max_new_tokens": num, "output_logits": True, **settings}
    return model.generate(**inputs, return_dict_in_generate=True, **settings)


def logits_of(model: nn.Module, inputs: dict[str, Any], **settings: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, **settings).logits


@lru_cache
def untouched(family: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and greedy ids of the padded batch on the untouched model."""
    model, inputs = model_of(family), batch_of(family)
    return logits_of(model, inputs), greedy(model, inputs, 3).sequences


@contextmanager
def spied(model: nn.Module) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the text model's next call; enter it inside an attachment."""
    seen: dict[str, Any] = {}

    def spy(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    text: Any = adapter_for(model).language_model(model)
    handle = text.register_forward_pre_hook(spy, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def same_steps(
    together: Any, row: int, alone: Any, alone_row: int = 0, atol: float = TOLERANCE
) -> None:
    """One row of a batch's generation equals that sample's own."""
    num = len(alone.logits)
    assert together.sequences[row, -num:].tolist() == alone.sequences[alone_row, -num:].tolist()
    for ours, theirs in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(ours[row], theirs[alone_row], atol=atol, rtol=0)


def snapshot(model: nn.Module) -> dict[str, dict]:
    """Everything every module holds; containers are copied, the rest compared by identity."""
    taken = {}
    for name, module in model.named_modules():
        taken[name] = {
            key: type(value)(value) if isinstance(value, (dict, list, set, OrderedDict)) else value
            for key, value in vars(module).items()
        }
    return taken


def assert_same(before: dict[str, dict], after: dict[str, dict]) -> None:
    assert before.keys() == after.keys()
    for name, attributes in before.items():
        assert attributes.keys() == after[name].keys(), name
        for key, value in attributes.items():
            now = after[name][key]
            if isinstance(value, dict):
                assert list(value) == list(now), (name, key)
                assert all(value[k] is now[k] for k in value), (name, key)
            elif isinstance(value, (list, set)):
                assert value == now, (name, key)
            else:
                assert value is now or value == now, (name, key)
