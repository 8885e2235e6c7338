"""Models of full depth and width whose own layers cost nothing, to time a method's own work.

A *hollow* model is a real transformers model. Its modules, hooks and shapes are those of the full
one; but whatever the model itself computes (linear layers, attention, MLPs, norms) returns numbers
from a fixed buffer instead. Projections and norms that a method calls on its own account are real,
with one set of weights shared by all layers, so that nothing a method does is left out of the time.

Legend: T frames or tiles, P patches of one, C channels, S tokens of the prompt, N visual tokens.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from foveate.attach.attachment import Attachment
from foveate.models.registry import adapter_for

#: Who is spending the time: the model itself, and the parts of an attachment.
MODEL, ENCODER, PROJECTOR, DECODER = "model", "encoder", "projector", "decoder"
PARTS = (ENCODER, PROJECTOR, DECODER)
IMAGE, TEXT_BEFORE, TEXT_BEHIND = 999, 20, 40
NOISE = 40_000_000


class Clock:
    """Time by part, exclusive: the innermost part that is entered gets it."""

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.now = now
        self.stack = [MODEL]
        self.marks = False
        self.reset()

    def reset(self) -> None:
        """Forget what was spent."""
        self.spent: dict[str, float] = defaultdict(float)
        self.last = self.now()

    @property
    def part(self) -> str:
        """Who is working now."""
        return self.stack[-1]

    @contextmanager
    def inside(self, part: str) -> Iterator[None]:
        """Everything in here belongs to `part`, unless it enters another."""
        self._settle()
        self.stack.append(part)
        try:
            if self.marks:
                with torch.profiler.record_function(f"part:{part}"):
                    yield
            else:
                yield
        finally:
            self._settle()
            self.stack.pop()

    def wrap(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` with its time given to `part`."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.inside(part):
                return function(*args, **kwargs)

        return timed

    def _settle(self) -> None:
        now = self.now()
        self.spent[self.stack[-1]] += now - self.last
        self.last = now


@dataclass(eq=False)
class Hollow:
    """A hollow model with the inputs of one call.

    Attributes:
        model: the model.
        inputs: arguments of its forward.
        clock: who spends the time.
        attentions: attention modules of the decoder, first to last.
        forwards: their hollow forwards.
        real_attention: their forward as the class has it.
    """

    model: nn.Module
    inputs: dict[str, Any]
    clock: Clock
    attentions: tuple[nn.Module, ...]
    forwards: tuple[Callable[..., Any], ...]
    real_attention: Callable[..., Any]

    @torch.inference_mode()
    def run(self, use_cache: bool) -> None:
        """One prefill."""
        self.model(**self.inputs, use_cache=use_cache, logits_to_keep=1)


def hollow_video(clock: Clock) -> Hollow:
    """LLaVA-OneVision-7B with 32 frames of 196 tokens, four scenes, two thirds of it still."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={
            "model_type": "siglip_vision_model",
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_hidden_layers": 26,
            "num_attention_heads": 16,
            "image_size": 384,
            "patch_size": 14,
            "vision_use_head": False,
        },
        text_config={"model_type": "qwen2", **QWEN2_7B},
        image_token_index=IMAGE - 1,
        video_token_index=IMAGE,
    )
    pixels = torch.rand(8, 3, 384, 384, generator=_seed()).repeat_interleave(4, 0)
    inputs = {"pixel_values_videos": pixels[None]}
    x_TNC = scenes(32, 196, 3584)
    hollow = _hollow(LlavaOnevisionForConditionalGeneration, config, inputs, 32 * 196 + 1, clock)
    base: Any = adapter_for(hollow.model).base(hollow.model)
    base.multi_modal_projector.forward = lambda x: x_TNC
    pool = base.apply_pooling  # the adapter asks it what becomes of a map of scores
    base.apply_pooling = lambda x: x if x is x_TNC else pool(x)
    return hollow


def hollow_image(clock: Clock) -> Hollow:
    """LLaVA-NeXT-7B with an image of 672 x 672: 2880 patches in 5 tiles, and 48 newline tokens."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "image_size": 336,
            "patch_size": 14,
        },
        text_config={"model_type": "llama", **LLAMA_7B},
        image_token_index=IMAGE,
    )
    inputs = {
        "pixel_values": torch.rand(1, 5, 3, 336, 336, generator=_seed()),
        "image_sizes": torch.tensor([[672, 672]]),
    }
    x_TPC = torch.randn(5, 576, 4096, generator=_seed())
    hollow = _hollow(LlavaNextForConditionalGeneration, config, inputs, 2880 + 48, clock)
    base: Any = adapter_for(hollow.model).base(hollow.model)
    base.multi_modal_projector.forward = lambda x: x_TPC
    return hollow


QWEN2_7B = {
    "vocab_size": 1000,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "max_position_embeddings": 32768,
}
LLAMA_7B = {
    "vocab_size": 1000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
}


def scenes(frames: int, places: int, channels: int) -> torch.Tensor:
    """Features of four scenes in which about two thirds of the places stand still."""
    generator = _seed()
    still_TN1 = torch.rand(1, places, 1, generator=generator).expand(frames, -1, -1) < 0.67
    scene_TNC = torch.randn(4, places, channels, generator=generator)
    scene_TNC = scene_TNC.repeat_interleave(frames // 4, 0)
    moving_TNC = torch.randn(frames, places, channels, generator=generator)
    return torch.where(still_TN1, scene_TNC + 0.3 * moving_TNC, moving_TNC)


@contextmanager
def timed_hooks(hollow: Hollow, attach: Callable[[], Attachment]) -> Iterator[Attachment]:
    """Attach, with the time of every hook and wrapper given to its part of the attachment.

    Everything is taken off again at the end.
    """
    clock, model = hollow.clock, hollow.model
    adapter = adapter_for(model)
    base: Any = adapter.base(model)
    before = {id(hook) for _, _, hook in _hooks(model)}
    run = attach()
    try:
        layers = {id(m) for layer in adapter.layers(model) for m in layer.modules()}
        towers = {id(m) for tower in adapter.towers(model).values() for m in tower.module.modules()}
        for module, table, hook in _hooks(model):
            if id(hook) in before:
                continue
            part = PROJECTOR
            if id(module) in layers:
                part = DECODER
            elif id(module) in towers:
                part = ENCODER
            key = next(key for key, value in table.items() if value is hook)
            table[key] = clock.wrap(part, hook)
        for name in adapter.feature_methods.values():
            if name in vars(base):
                vars(base)[name] = clock.wrap(ENCODER, vars(base)[name])
        yield run
    finally:
        run.remove()


@contextmanager
def hollow_rules(hollow: Hollow) -> Iterator[Callable[..., Any] | None]:
    """Keep an attention rule from computing all layers in full; gives the first layer's forward.

    Inside `timed_hooks`. None where the method has no rule.
    """
    rules = [vars(module)["forward"] for module in hollow.attentions]
    changed = [rule is not own for rule, own in zip(rules, hollow.forwards, strict=True)]
    for module, own in zip(hollow.attentions, hollow.forwards, strict=True):
        vars(module)["forward"] = own
    try:
        yield rules[0] if any(changed) else None
    finally:
        for module, rule in zip(hollow.attentions, rules, strict=True):
            vars(module)["forward"] = rule


@torch.inference_mode()
def rule_seconds(hollow: Hollow, rule: Callable[..., Any], repeats: int) -> float:
    """What one layer's attention takes longer under a rule, projections and all; median."""
    clock, module = hollow.clock, hollow.attentions[0]
    extra = []

    def both(*args: Any, **kwargs: Any) -> Any:
        given = {**kwargs, "past_key_values": None}
        with clock.inside("plain"):
            hollow.real_attention(module, *args, **{**given, "attention_mask": None})
        with clock.inside("rule"):
            rule(*args, **given)
        return hollow.forwards[0](*args, **kwargs)

    vars(module)["forward"] = both
    try:
        for _ in range(repeats + 1):
            clock.reset()
            hollow.run(use_cache=False)
            extra.append(clock.spent["rule"] - clock.spent["plain"])
    finally:
        vars(module)["forward"] = hollow.forwards[0]
    return max(statistics.median(extra[1:]), 0.0)


@torch.inference_mode()
def working_memory(hollow: Hollow, use_cache: bool) -> int:
    """Most bytes that one of the attachment's hooks holds beside what was there when it began."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    hollow.clock.marks = True
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            hollow.run(use_cache)
    finally:
        hollow.clock.marks = False
    happened: list[tuple[int, int, str, int]] = []
    for event in profile.profiler.kineto_results.events():  # pyright: ignore
        start, name = event.start_ns(), event.name()
        if name == "[memory]":
            happened.append((start, 1, name, event.nbytes()))
        elif name.startswith("part:"):
            happened += [(start, 0, name, 0), (start + event.duration_ns(), 2, name, 0)]
    total = peak = 0
    stack: list[tuple[str, int]] = []
    for _, kind, name, size in sorted(happened):
        if kind == 0:
            stack.append((name, total))
        elif kind == 2:
            stack.pop()
        else:
            total += size
            if stack and stack[-1][0] != f"part:{MODEL}":
                peak = max(peak, total - stack[0][1])
    return peak


def _hooks(model: nn.Module) -> list[tuple[nn.Module, dict[int, Any], Any]]:
    return [
        (module, table, hook)
        for module in model.modules()
        for table in (module._forward_pre_hooks, module._forward_hooks)
        for hook in list(table.values())
    ]


def _seed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _hollow(
    kind: type, config: Any, inputs: dict[str, Any], num_visual: int, clock: Clock
) -> Hollow:
    with torch.device("meta"):
        model: Any = kind(config)
    model.eval()
    adapter = adapter_for(model)
    base, text = adapter.base(model), adapter.language_model(model)
    noise = torch.randn(NOISE, generator=_seed())
    counter = iter(range(10**9))

    def buffer(*shape: int) -> Callable[..., torch.Tensor]:
        """Numbers of a shape whose first dimensions are the input's."""
        first = next(counter) * 1_000_448 % 12_000_000

        def make(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            lead = x.shape[: 3 - len(shape)] if shape else x.shape
            size = (*lead, *shape)
            return noise[first : first + torch.Size(size).numel()].view(size)

        return make

    # -- the language model: real projections, norms and embeddings, shared by all layers
    text.rotary_emb = type(text.rotary_emb)(text.config)
    text.embed_tokens = nn.Embedding(text.config.vocab_size, text.config.hidden_size)
    first = adapter.layers(model)[0].get_submodule("self_attn")
    for projection in first.children():
        if isinstance(projection, nn.Linear):
            _materialise(projection)
    norm = _materialise(adapter.layers(model)[0].get_submodule("input_layernorm"))
    for layer in adapter.layers(model):
        attention: Any = layer.get_submodule("self_attn")
        for name, projection in list(attention.named_children()):
            if isinstance(projection, nn.Linear):
                shared = first.get_submodule(name)
                projection.weight, projection.bias = shared.weight, shared.bias
                _cheap(projection, clock, buffer(projection.out_features))
        layer.get_submodule("input_layernorm").weight = norm.weight
        _cheap(layer.get_submodule("input_layernorm"), clock, lambda x: x)
        layer.forward = _hollow_layer(layer)
        layer.get_submodule("mlp").forward = buffer()
        attention.forward = _hollow_attention(attention, clock, buffer())
    text.norm.forward = lambda x: x
    model.lm_head.forward = lambda x: x
    # -- the vision tower
    tower = next(iter(adapter.towers(model).values()))
    inner: Any = getattr(tower.module, "vision_model", tower.module)
    side = config.vision_config.image_size // config.vision_config.patch_size
    length, channels = side * side + tower.num_prefix, config.vision_config.hidden_size
    inner.embeddings.forward = buffer(length, channels)
    for name in ("pre_layrnorm", "post_layernorm"):
        if hasattr(inner, name):
            getattr(inner, name).forward = lambda x: x
    for block, attention in zip(tower.blocks, tower.attentions, strict=True):
        for projection in attention.children():
            if isinstance(projection, nn.Linear):
                projection.forward = buffer(projection.out_features)
        for norm in ("layer_norm1", "layer_norm2"):
            block.get_submodule(norm).forward = lambda x: x
        block.forward = _hollow_block(block)
        block.get_submodule("mlp").forward = buffer()
        attention.forward = _hollow_attention(attention, clock, buffer())
    base.image_newline = nn.Parameter(torch.randn(text.config.hidden_size), requires_grad=False)
    for name in adapter.feature_methods.values():
        # The attachment calls it inside its own wrapper; the tower's work is the model's.
        vars(base)[name] = clock.wrap(MODEL, getattr(base, name))
    ids = [*range(20, 20 + TEXT_BEFORE), *[IMAGE] * num_visual, *range(50, 50 + TEXT_BEHIND)]
    inputs["input_ids"] = torch.tensor([ids])
    inputs["attention_mask"] = torch.ones(1, len(ids), dtype=torch.long)
    attentions = adapter.text_attentions(model)
    forwards = tuple(vars(module)["forward"] for module in attentions)
    return Hollow(model, inputs, clock, attentions, forwards, type(attentions[0]).forward)


def _materialise(module: nn.Module) -> Any:
    module.to_empty(device="cpu")
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02, generator=_seed())
    return module


def _cheap(module: Any, clock: Clock, cheap: Callable[..., torch.Tensor]) -> None:
    """Let a module cost nothing when the model calls it, and its usual time for anybody else."""
    original = module.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        return cheap(x) if clock.part == MODEL else original(x)

    module.forward = forward


def _hollow_layer(layer: Any) -> Callable[..., torch.Tensor]:
    """Call what a decoder layer calls, and hand on its input."""

    def forward(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        layer.self_attn(hidden_states=hidden_states, **kwargs)
        layer.mlp(hidden_states)
        return hidden_states

    return forward


def _hollow_block(block: Any) -> Callable[..., torch.Tensor]:
    """Call what a block of the vision tower calls, and hand on its input."""

    def forward(hidden_states: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        block.self_attn(hidden_states=hidden_states, attention_mask=attention_mask, **kwargs)
        block.mlp(block.layer_norm2(hidden_states))
        return hidden_states

    return forward


def _hollow_attention(
    module: Any, clock: Clock, output: Callable[..., torch.Tensor]
) -> Callable[..., Any]:
    """Project (hooks see that), cache, and answer with numbers of the right shape."""

    @functools.wraps(module.forward)
    def forward(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with clock.inside(MODEL):
            q, k, v = (getattr(module, f"{name}_proj")(hidden_states) for name in "qkv")
            cache = kwargs.get("past_key_values")
            if cache is not None:
                heads = [x.unflatten(-1, (-1, module.head_dim)).transpose(1, 2) for x in (k, v)]
                cache.update(*heads, module.layer_idx)
            if hasattr(module, "out_proj"):  # of a vision tower; methods may ask its input
                module.out_proj(q)
        return output(q if q.shape == hidden_states.shape else hidden_states), None

    return forward
