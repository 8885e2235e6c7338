"""No method computes attention a second time, or has the model run its eager form.

Legend: B batch, H heads, R query rows, S tokens of the sample.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from attach_suite import attach, behaviour, logits_of, model_of, one_of
from method_table import METHOD_TABLE
from torch import nn

from foveate import ops
from foveate.core import Recipe
from foveate.models.registry import adapter_for

#: A random walk over a layer's attention is what ranks the tokens in this paper; it goes over the
#: queries and keys of layers that are short already, without values and without an output.
WALKS = ("aim",)

LANGUAGE, ENCODER = "language", "encoder"


class Calls:
    """What was computed of attention, by part of the model.

    Attributes:
        kernel_rows: query rows that went through `scaled_dot_product_attention`.
        kernel_calls: how often it was called.
        own_rows: rows of each call of our own score functions, per layer of the language model.
        walks: calls of page rank.
        implementations: names of the implementation that attention modules had while they ran.
    """

    def __init__(self) -> None:
        self.kernel_rows: dict[str, int] = defaultdict(int)
        self.kernel_calls: dict[str, int] = defaultdict(int)
        self.own_rows: list[int] = []
        self.own_encoder_calls = 0
        self.walks = 0
        self.implementations: set[str] = set()
        self.weights_asked = False


@contextmanager
def counted(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> Iterator[Calls]:
    """Count inside an attachment; takes its own hooks off again."""
    calls, where = Calls(), [ENCODER]
    adapter = adapter_for(model)
    handles = []

    def enter(module: nn.Module, args: tuple) -> None:
        where[0] = LANGUAGE

    def leave(module: nn.Module, args: tuple, output: Any) -> None:
        where[0] = ENCODER

    def running(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        calls.implementations.add(module.config._attn_implementation)
        calls.weights_asked |= bool(kwargs.get("output_attentions"))

    text = adapter.language_model(model)
    # Behind the hook that shortens the prompt: what it reads is the encoder's attention.
    handles.append(text.register_forward_pre_hook(enter))
    handles.append(text.register_forward_hook(leave))
    towers = {id(tower): tower for tower in adapter.towers(model).values()}.values()
    for module in (*adapter.text_attentions(model), *(a for t in towers for a in t.attentions)):
        handles.append(module.register_forward_pre_hook(running, with_kwargs=True))

    kernel, rows_of, sums_of, walk = (
        torch.nn.functional.scaled_dot_product_attention,
        ops.attention_rows,
        ops.attention_column_sums,
        ops.page_rank_qk,
    )

    def count_kernel(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.kernel_calls[where[0]] += 1
        calls.kernel_rows[where[0]] += query.shape[0] * query.shape[-2]
        return kernel(query, *args, **kwargs)

    def count_rows(function: Any) -> Any:
        def own(query: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if where[0] == LANGUAGE:
                calls.own_rows.append(query.shape[0] * query.shape[-2])
            else:
                calls.own_encoder_calls += 1
            return function(query, *args, **kwargs)

        return own

    def count_walk(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.walks += 1
        return walk(*args, **kwargs)

    with monkeypatch.context() as patch:
        functional = torch.nn.functional
        patch.setattr(functional, "scaled_dot_product_attention", count_kernel)
        patch.setattr(ops, "attention_rows", count_rows(rows_of))
        patch.setattr(ops, "attention_column_sums", count_rows(sums_of))
        patch.setattr(ops, "page_rank_qk", count_walk)
        try:
            yield calls
        finally:
            for handle in handles:
                handle.remove()


def method_of(name: str) -> Any:
    return next(iter(Recipe.of(METHOD_TABLE[name].recipe))).method


@behaviour("attention is computed once, by the model's own kernel")
def test_attention_is_computed_once(name, family, monkeypatch):
    model, inputs = model_of(family), one_of(family)
    with counted(model, monkeypatch) as plain:
        logits_of(model, inputs)
    with attach(name, model) as run, counted(model, monkeypatch) as mine:
        logits_of(model, inputs)
    report = run.report
    method, length = method_of(name), inputs["input_ids"].shape[1]
    # The model's own kernel: never for more rows than without the recipe, and, block-wise reading
    # and replaced attention apart, exactly once per layer.
    assert mine.kernel_rows[LANGUAGE] <= plain.kernel_rows[LANGUAGE]
    if "video_xl2" not in name:
        assert mine.kernel_calls[LANGUAGE] <= plain.kernel_calls[LANGUAGE]
    # In the encoder at most once more for each block that the method reads.
    blocks = len(next(iter(adapter_for(model).towers(model).values())).blocks)
    reading = len(set(method.encoder_layers(blocks, blocks - 1)))
    most = plain.kernel_rows[ENCODER] * (1 + reading / blocks)
    assert mine.kernel_rows[ENCODER] <= most
    # Our own rows: those of text, once per layer; never those of the whole sequence.
    text = length - sum(item.before for item in report.items)
    assert all(rows <= max(text, 1) < length for rows in mine.own_rows)
    asked = {*method.attention_layers(4), *method.decoder_layers(4)}
    most = 4 * 2 if "cache" in method.stages() else 2 * len(asked)
    assert len(mine.own_rows) <= max(most, 0)
    assert (mine.walks > 0) == (name in WALKS)


@pytest.mark.parametrize("name", [name for name, row in METHOD_TABLE.items() if row.families])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_implementation_stays(name, implementation, monkeypatch):
    family = next(f for f in ("llava_onevision", "llava") if f in METHOD_TABLE[name].families)
    model = model_of(family, attn=implementation)
    before = {path: m.config._attn_implementation for path, m in configured(model)}
    with attach(name, model), counted(model, monkeypatch) as calls:
        logits_of(model, one_of(family))
    assert calls.implementations == {implementation}
    assert not calls.weights_asked
    assert {path: m.config._attn_implementation for path, m in configured(model)} == before


def configured(model: nn.Module) -> list[tuple[str, Any]]:
    return [(path, m) for path, m in model.named_modules() if hasattr(m, "config")]


def test_the_counter_sees_a_second_attention(monkeypatch):
    """A test that cannot fail proves nothing: attention over all rows is noticed."""
    model, inputs = model_of("llava_onevision"), one_of("llava_onevision")
    layer = adapter_for(model).layers(model)[1]

    def again(module: nn.Module, args: tuple, output: Any) -> None:
        x_B1SD = (output[0] if isinstance(output, tuple) else output)[:, None]
        torch.nn.functional.scaled_dot_product_attention(x_B1SD, x_B1SD, x_B1SD)
        ops.attention_rows(x_B1SD, x_B1SD)

    with counted(model, monkeypatch) as plain:
        logits_of(model, inputs)
    handle = layer.register_forward_hook(again)
    with counted(model, monkeypatch) as mine:
        logits_of(model, inputs)
    handle.remove()
    length = inputs["input_ids"].shape[1]
    assert mine.kernel_rows[LANGUAGE] == plain.kernel_rows[LANGUAGE] + length
    assert mine.own_rows == [length] and plain.own_rows == []
