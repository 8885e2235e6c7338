"""A forward of a tiny model with its feature method watched, for the tests of the adapters."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from foveate.models import adapter_for
from foveate.models.adapter import Adapter
from foveate.models.tower import VisionTower
from tiny import TINY_FAMILIES, Sample, tiny_inputs, tiny_model

CASES = [
    (family, modality)
    for family in TINY_FAMILIES
    for modality in (
        ("image",)
        if family in ("llava", "llava_next", "internvl", "smolvlm", "idefics3")
        else ("image", "video")
    )
]
ANYRES = ("llava_next", "llava_next_video", "llava_onevision")


@dataclass
class Call:
    """One forward and what the feature method of one modality got and gave in it."""

    model: nn.Module
    adapter: Adapter
    modality: str
    inputs: dict[str, torch.Tensor]
    arguments: dict[str, Any] = field(default_factory=dict)
    features: Any = None

    @property
    def grids(self) -> list[Any]:
        return self.adapter.grids(self.model, self.modality, self.arguments, self.features)

    def encode_again(self) -> None:
        """Repeat the feature method alone, without the language model."""
        arguments = {**self.arguments, **self.arguments.get("kwargs", {})}
        arguments.pop("kwargs", None)
        method = getattr(self.adapter.base(self.model), self.adapter.feature_methods[self.modality])
        with torch.no_grad():
            self.features = method(**arguments).pooler_output

    @property
    def items(self) -> list[torch.Tensor]:
        return self.adapter.split_features(self.model, self.features, self.grids)

    @property
    def tower(self) -> VisionTower:
        return self.adapter.towers(self.model)[self.modality]


@contextmanager
def watched(call: Call) -> Iterator[None]:
    """Record the arguments and the output of the feature method, as an attachment does."""
    base = call.adapter.base(call.model)
    name = call.adapter.feature_methods[call.modality]
    method = getattr(base, name)
    signature = inspect.signature(method)

    def recorded(*args: Any, **kwargs: Any) -> Any:
        call.arguments = dict(signature.bind(*args, **kwargs).arguments)
        output = method(*args, **kwargs)
        call.features = output.pooler_output
        return output

    setattr(base, name, recorded)
    try:
        yield
    finally:
        delattr(base, name)


def run(
    family: str,
    modality: str,
    samples: tuple[Sample, ...] | None = None,
    *,
    attn: str = "sdpa",
    model: nn.Module | None = None,
) -> Call:
    if samples is None:
        samples = (
            Sample((3, 2, 4), (modality, modality)),
            Sample((2,), ()),
            Sample((5, 7), (modality,)),
        )
    model = model or tiny_model(family, attn=attn)
    adapter = adapter_for(model)
    assert isinstance(adapter, Adapter)
    call = Call(model, adapter, modality, tiny_inputs(family, samples=samples))
    with watched(call), torch.no_grad():
        model(**call.inputs)
    return call
