"""Shared by the suite: cached tiny models, batches of every shape, and what enters the text model.

Legend: B samples, L padded tokens, S tokens of a sample, N tokens of an item, D channels.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from method_table import METHOD_TABLE, WITH_VIDEOS
from torch import nn

import foveate
from foveate.models.registry import adapter_for
from tiny import TINY_FAMILIES, Sample, tiny_inputs, tiny_modalities, tiny_model

#: Families that between them have [CLS], newlines, tiles, M-RoPE, deepstack and packed rows.
REPRESENTATIVE = ("llava_onevision", "qwen3_vl", "internvl")
TOLERANCE = 2e-5


@lru_cache
def model_of(family: str, dtype: torch.dtype = torch.float32, attn: str = "sdpa") -> nn.Module:
    """One model per configuration for the whole process; a leftover hook would show elsewhere."""
    return tiny_model(family, dtype=dtype, attn=attn)


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


def cases(families: tuple[str, ...] = REPRESENTATIVE, **wanted: Any) -> list[tuple[str, str]]:
    """(method, family) pairs; a method that runs on none of the families takes its first two."""
    pairs = []
    for name, row in METHOD_TABLE.items():
        if any(getattr(row, field) != value for field, value in wanted.items()):
            continue
        fitting = [family for family in families if family in row.families]
        pairs += [(name, family) for family in fitting or row.families[:2]]
    return pairs


def attach(name: str, model: nn.Module, **options: Any) -> foveate.Attachment:
    row = METHOD_TABLE[name]
    if row.reduces and not {"retain", "tokens"} & set(options):
        options["retain"] = row.retain
    return foveate.reduce(model, row.recipe, **options)


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


def same_steps(together: Any, row: int, alone: Any, alone_row: int = 0) -> None:
    """One row of a batch's generation equals that sample's own."""
    num = len(alone.logits)
    assert together.sequences[row, -num:].tolist() == alone.sequences[alone_row, -num:].tolist()
    for ours, theirs in zip(together.logits, alone.logits, strict=True):
        torch.testing.assert_close(ours[row], theirs[alone_row], atol=TOLERANCE, rtol=0)


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


ALL = TINY_FAMILIES
