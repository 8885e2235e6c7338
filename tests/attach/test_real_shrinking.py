"""Lengths and FLOPs of a report are those of the run: tensors are measured, products are counted.

The counter is switched on only while the model's own modules run, so that what a method computes
itself (rows, distances, projections ahead of a layer) is not in it.

Legend: S tokens of the sample, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attach_suite import attach, behaviour, model_of, one_of
from method_table import METHOD_TABLE
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from foveate.core.flops import prefill_flops
from foveate.models.dims import text_dims, vision_dims
from foveate.models.registry import adapter_for


@contextmanager
def counted(modules: list[nn.Module]) -> Iterator[list[int]]:
    """FLOPs of the forwards of modules (eager: the counter sees no fused kernels on a CPU)."""
    total = [0]
    previous = [module.__dict__.get("forward") for module in modules]

    def wrap(forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                output = forward(*args, **kwargs)
            total[0] += counter.get_total_flops()
            return output

        return run

    for module in modules:
        module.__dict__["forward"] = wrap(module.forward)
    try:
        yield total
    finally:
        for module, forward in zip(modules, previous, strict=True):
            del module.__dict__["forward"]
            if forward is not None:
                module.__dict__["forward"] = forward


def decoder_modules(model: nn.Module) -> list[nn.Module]:
    adapter = adapter_for(model)
    return [*adapter.text_attentions(model), *adapter.text_mlps(model)]


@contextmanager
def entering(model: nn.Module) -> Iterator[list[int]]:
    """Tokens that really enter every decoder layer, behind all other hooks."""
    lengths: list[int] = []

    def note(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        hidden_BSD = args[0] if args else kwargs["hidden_states"]
        lengths.append(hidden_BSD.shape[1])

    layers = adapter_for(model).layers(model)
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        yield lengths
    finally:
        for handle in handles:
            handle.remove()


@behaviour("lengths, cache and FLOPs of the report are those of the run")
@torch.no_grad()
def test_the_run_is_what_the_report_says(name, family):
    model = model_of(family, attn="eager")
    dims = text_dims(model)
    for index in (0, 1):  # one item; two, an image and a video where the family has both
        inputs = one_of(family, index)
        with (
            attach(name, model) as run,
            counted(decoder_modules(model)) as flops,
            entering(model) as lengths,
        ):
            cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
        report = run.report
        assert report.layer_lengths == [lengths] and len(lengths) == dims.num_layers
        assert [layer.keys.shape[-2] for layer in cache.layers] == report.cache_lengths[0]
        assert [layer.values.shape[-2] for layer in cache.layers] == report.cache_lengths[0]
        assert all(getattr(layer, "valid_BT", None) is None for layer in cache.layers)
        # The analytic count, from lengths alone.
        pairs = report.attention_pairs[0] if report.attention_pairs else None
        expected = prefill_flops(dims, lengths, attention_pairs=pairs, logits_for=0)
        assert flops[0] == expected
        assert report.flops["reduced"]["prefill"] == expected + dims.head
        text = inputs["input_ids"].shape[1] - report.visual_before
        assert report.flops["untouched"]["prefill"] == prefill_flops(
            dims, text + report.visual_before
        )
        assert report.prompt_lengths == [text + report.visual_after]


ENCODING = [
    (name, family)
    for name, row in METHOD_TABLE.items()
    for family in ("llava_onevision", "llava_next", "internvl")
    if "encoder" in row.stages and family in row.families
]


@pytest.mark.parametrize(("name", "family"), ENCODING)
@torch.no_grad()
def test_a_shortened_encoder_is_what_the_report_says(name, family):
    model, inputs = model_of(family, attn="eager"), one_of(family)
    vision = vision_dims(model)
    (tower,) = {id(t): t for t in adapter_for(model).towers(model).values()}.values()
    blocks = [*tower.attentions, *(block.get_submodule("mlp") for block in tower.blocks)]
    last: list[torch.Size] = []
    with attach(name, model) as run, counted(blocks) as flops:
        handle = blocks[-1].register_forward_pre_hook(lambda m, args: last.append(args[0].shape))
        with sdpa_kernel(SDPBackend.MATH):  # what a method attends itself is counted, too
            model(**inputs)
        handle.remove()
    (first, *_), parts = run.report.stages, run.report.flops
    assert first.stage == "encoder"
    # The rule counts every token of the first block as an embedded patch, and SigLIP's own head,
    # which runs behind the blocks, on what the last MLP has.
    outside = vision.patch_embedding * sum(first.before)
    outside += sum(images * vision.pool(tokens) for images, tokens, _ in last)
    assert parts["reduced"]["encoder"] == flops[0] + outside
    # A cut behind the last block saves nothing in the encoder.
    assert parts["reduced"]["encoder"] <= parts["untouched"]["encoder"]
