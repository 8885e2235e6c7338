"""A stream of frames through a model: read group by group, remember little, answer at any time.

No hook stays on the model. Frames go through its own feature method and its own language model,
with a cache that holds the system prompt and what the memory keeps; the rest is a mask, position
ids and a selection of slots.

Legend: T frames of a group, L tokens of them, N tokens of the features, S slots of the cache,
D channels, H query heads.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from foveate import ops
from foveate.attach.attachment import refuse_hooked
from foveate.attach.stream_cache import StreamCache, StreamLayer
from foveate.attach.stream_features import FrameFeatures
from foveate.attach.stream_positions import grid_clock
from foveate.core import Budget, Modality, Recipe
from foveate.core.stream import RecallMemory, RecentMemory, StreamMemory, StreamStep
from foveate.errors import AttachmentError, UnsupportedModelError
from foveate.models.adapter import Adapter
from foveate.models.registry import adapter_for
from foveate.models.rotary import project_text_qk

#: Rotary embeddings whose angles depend on how long a sequence is.
_MOVING = ("dynamic", "longrope")


#: Most recent frames that a stream remembers when nobody says otherwise.
DEFAULT_CAPACITY = 64


def split_recipe(
    recipe: Recipe | None, capacity: int | None, model: nn.Module
) -> tuple[StreamMemory | RecallMemory, Recipe | None]:
    """The memory of a stream, and the methods that shorten every group before it.

    Args:
        recipe: all methods; None: none.
        capacity: of the memory; None: its own.
        model: what the methods have to fit.

    Raises:
        AttachmentError: two methods have a memory, or one acts where a stream cannot ask it.
    """
    recent = RecentMemory(DEFAULT_CAPACITY if capacity is None else capacity)
    if recipe is None:
        return recent, None
    if capacity is not None:
        holders = [step for step in recipe if step.method.stream_memory() is not None]
        if holders:
            recipe = recipe.with_arguments(capacity=capacity)
    for step in recipe:
        step.method.check(None, len(_language_adapter(model).layers(model)))
    found = [(step.method.stream_memory(), step) for step in recipe]
    memories = [memory for memory, _ in found if memory is not None]
    if len(memories) > 1:
        raise AttachmentError(f"{recipe} names {len(memories)} memories; a stream has one.")
    rest = tuple(step for memory, step in found if memory is None)
    for step in rest:
        method = step.method
        inside = set(step.stages) - {"encoder", "projector"}
        needs = [n for need in method.needs for n in ((need,) if isinstance(need, str) else need)]
        text = [name for name in needs if name.startswith(("text.", "paired."))]
        if inside or text:
            why = (
                f"it acts at {', '.join(sorted(inside))}"
                if inside
                else f"it reads {text[0]}, and the question is not known while frames are watched"
            )
            raise AttachmentError(
                f"{method.name} cannot shorten the frames of a stream: {why}. Take a method of the "
                'encoder or projector stage that needs no text, such as "divprune", or name one '
                'stage of it: "todre@projector".'
            )
    memory = memories[0] if memories else recent
    return memory, Recipe(rest, recipe.positions) if rest else None


class StreamEngine:
    """One stream on one model, in embeddings and token ids; `foveate.Stream` adds the processor.

    Not safe for use from several threads at once.

    Args:
        model: a model of a family whose frames can be read one by one.
        system_ids: int64 [C], the prompt before the first frame.
        memory: what is remembered.
        recipe: methods that shorten every group before the memory sees it; None: none.
        budget: of that recipe.
        renumber: keys are turned to contiguous positions; None: as the memory was published.

    Raises:
        UnsupportedModelError: the frames of this family cannot be read one by one.
        AttachmentError: the recipe cannot act on the model, or its attention takes no masks.

    Attributes:
        frames: numbers of the remembered frames, counted from the first one pushed, ascending.
        num_frames: frames pushed.
        cache: keys and values.
    """

    def __init__(
        self,
        model: nn.Module,
        system_ids: Tensor,
        memory: StreamMemory,
        recipe: Recipe | None = None,
        budget: Budget | None = None,
        renumber: bool | None = None,
    ) -> None:
        self.model: Any = model
        self.adapter = _language_adapter(model)
        self.modality = stream_modality(model)
        self.text: Any = self.adapter.language_model(model)
        self.memory = memory
        self.clock = grid_clock(model, self.adapter)
        self.renumber = memory.renumbers if renumber is None else renumber
        if self.clock is not None:
            _check_clock(self.adapter.docs_name, memory, self.renumber)
        _check_text(self.text, self.renumber)
        refuse_hooked(model)
        self.frames: list[int] = []
        self.num_frames = 0
        #: Frames that the model joins into one plane; numbers and times are those of planes.
        self.joined = 1 if self.clock is None else self.clock.joined
        self.broken = False
        with torch.inference_mode():
            self.cache = self._read_system(system_ids)
        self.features = FrameFeatures(model, self.adapter, self.modality, recipe, budget)

    @property
    def num_bytes(self) -> int:
        """Memory of all that is remembered."""
        return self.cache.num_bytes

    def close(self) -> None:
        """Take the recipe's hooks off."""
        self.features.close()

    @torch.inference_mode()
    def push(self, inputs: Mapping[str, Tensor], seconds: Sequence[float] | None = None) -> None:
        """Read one group of frames.

        Args:
            inputs: as the feature method takes them.
            seconds: when each plane is shown, for models that number by time; None: one a second.
        """
        x_LD, frame_L, present_T, ids, num_planes = self._see(inputs)
        plane_T2 = self._planes(num_planes, seconds)[present_T.cpu()]
        self.num_frames += num_planes
        if self.memory.picked or self.renumber:
            for frame, number in enumerate(ids):
                mine_L = frame_L == frame
                place_L2 = self.features.place_L2[mine_L]
                self._read(
                    x_LD[mine_L],
                    frame_L[mine_L] - frame,
                    [number],
                    place_L2,
                    plane_T2[frame : frame + 1],
                )
        elif ids:
            self._read(x_LD, frame_L, ids, self.features.place_L2, plane_T2)
        self.broken = False

    @contextmanager
    def aside(self) -> Iterator[None]:
        """What is read inside is forgotten afterwards, as if it had never come."""
        kept = copy(self.cache), deepcopy(self.memory), self.frames, self.num_frames, self.broken
        try:
            yield
        finally:
            self.cache, self.memory, self.frames, self.num_frames, self.broken = kept

    @torch.inference_mode()
    def answer(
        self,
        ids: Tensor,
        max_new_tokens: int,
        on_token: Callable[[int], None] | None = None,
    ) -> tuple[list[int], list[float]]:
        """Read a question behind what is remembered, decode greedily, and leave no trace.

        Args:
            ids: int64 [x], the prompt behind the last frame.
            max_new_tokens: longest answer.
            on_token: called with every new token.

        Returns:
            New tokens without the one that ends them, and how the question's last token spreads its
            attention over the remembered frames (mean over layers and heads; adds up to 1).
        """
        head, stops, new = self.model.get_output_embeddings(), _stop_ids(self.model), []
        cache = self.cache.open(self.text.rotary_emb)
        embeds_LD = self.question_embeddings(ids)
        placed = position_L = self.cache.text_positions(len(embeds_LD))
        with self._last_queries() as queries:
            hidden_LD = self._forward(embeds_LD, cache, position_L)
        if position_L is None:
            position_L = torch.tensor([cache.get_seq_length() - 1])
        rows = self._last_rows(cache, queries, position_L[..., -1:])
        weights = self.cache.share_of_entries(rows)
        while True:
            token = int(head(hidden_LD[-1:]).argmax())
            if token in stops:
                break
            new.append(token)
            if on_token is not None:
                on_token(token)
            if len(new) >= max_new_tokens:
                break
            position_L = None if placed is None else placed[:, -1:] + len(new)
            hidden_LD = self._forward(self._embed(torch.tensor([token])), cache, position_L)
        return new, weights.tolist()

    def question_embeddings(self, ids: Tensor) -> Tensor:
        """What closes a video in this family (a newline, say), and the question behind it."""
        embeds_LD = self._embed(ids)
        if self.features.closing_D is None:
            return embeds_LD
        return torch.cat([self.features.closing_D[None].to(embeds_LD), embeds_LD])

    # -- reading --------------------------------------------------------------------------------

    def _see(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, list[int], int]:
        """Encode a group; the stream counts as broken until its caller has remembered it.

        Returns:
            Features [L, D], the frame of the group that each belongs to, the planes of those
            frames, their numbers in the stream, and planes in all.
        """
        if self.broken:
            raise AttachmentError(
                "An earlier group of this stream failed halfway, and what is remembered may be "
                "incomplete; close it and start another."
            )
        self.broken = True
        x_LD, plane_L, num_planes = self.features(inputs)
        # Frames of which a method left nothing are as if they had not been there.
        present_T, frame_L = plane_L.unique_consecutive(return_inverse=True)
        ids = [self.num_frames + plane for plane in present_T.tolist()]
        return x_LD, frame_L, present_T, ids, num_planes

    def _embed(self, ids: Tensor) -> Tensor:
        table = self.text.get_input_embeddings()
        return table(ids.to(table.weight.device))

    def _forward(
        self,
        embeds_LD: Tensor,
        cache: DynamicCache,
        position_L: Tensor | None = None,
        allowed_LT: Tensor | None = None,
    ) -> Tensor:
        """Run the language model on new tokens; hidden states [L, D]. `cache` grows by them."""
        given: dict[str, Tensor] = {}
        if position_L is not None:
            # [1, L], or [3, 1, L] by time, row and column.
            given["position_ids"] = position_L.unsqueeze(-2)
        if allowed_LT is not None:
            # Four dimensions: transformers takes it as it is, under sdpa and eager alike.
            mask_LT = torch.zeros_like(allowed_LT, dtype=embeds_LD.dtype)
            mask_LT.masked_fill_(~allowed_LT, torch.finfo(embeds_LD.dtype).min)
            given["attention_mask"] = mask_LT[None, None]
        out = self.text(
            inputs_embeds=embeds_LD[None], past_key_values=cache, use_cache=True, **given
        )
        return out.last_hidden_state[0]

    def _read_system(self, ids: Tensor) -> StreamCache:
        if ids.numel() == 0:
            raise ValueError("The prompt before the first frame needs at least one token.")
        cache = DynamicCache()
        self._forward(self._embed(ids), cache)
        position_S = torch.arange(len(ids), device=self._embed(ids).device)
        read: list[Any] = list(cache.layers)
        layers = [StreamLayer(layer.keys, layer.values, position_S) for layer in read]
        if self.clock is not None:
            position_3S = position_S.expand(3, -1)
            layers = [StreamLayer(layer.keys, layer.values, position_3S) for layer in layers]
        return StreamCache(layers, self.renumber, self.clock)

    def _planes(self, count: int, seconds: Sequence[float] | None) -> Tensor:
        """Seconds and largest side of new planes, float64 [T, 2], on the CPU."""
        if seconds is None:
            seconds = range(self.num_frames, self.num_frames + count)
        if len(seconds) != count:
            raise ValueError(f"{len(seconds)} times for {count} planes of frames.")
        if self.clock is None:
            return torch.zeros(count, 2, dtype=torch.float64)
        side_T = self.features.shape_T2.cpu().amax(1).double()
        return torch.stack([torch.tensor([*seconds], dtype=torch.float64), side_T], dim=1)

    def _read(
        self,
        x_LD: Tensor,
        frame_L: Tensor,
        ids: list[int],
        place_L2: Tensor,
        plane_T2: Tensor,
    ) -> None:
        """Compute the tokens of some frames beside what is remembered, and keep what stays."""
        store = self.cache
        step = self.memory.push(x_LD, frame_L, len(ids))
        sees_TE = step.sees_TE.to(x_LD.device)
        allowed_LT = store.allowed(step, sees_TE)
        if self.clock is not None:
            position_L = store.place(step, place_L2, plane_T2)
        else:
            size_T = torch.bincount(step.frame_L, minlength=len(ids))
            rank_L = torch.arange(len(step.frame_L), device=x_LD.device)
            rank_L = rank_L - (size_T.cumsum(0) - size_T)[step.frame_L]
            position_L = store.starts(step, sees_TE)[step.frame_L] + rank_L
        seen_S = allowed_LT[0, : store.length] if self.renumber else None
        cache = store.open(self.text.rotary_emb, seen_S)
        kept = [step.kept_L] * len(store.layers)
        if self.memory.picked:
            with self._last_queries() as queries:
                self._forward(step.x_LD, cache, position_L, allowed_LT)
            kept = self._pick(self._last_rows(cache, queries, position_L[..., -1:]), step)
        else:
            self._forward(step.x_LD, cache, position_L, allowed_LT)
        store.commit(cache, step, position_L, kept, None if self.clock is None else plane_T2)
        everyone = [*self.frames, *ids]
        self.frames = [everyone[place] for place in step.remains_K.tolist()]

    @contextmanager
    def _last_queries(self) -> Iterator[list[Tensor]]:
        """Collects what the query projection of every layer gives the last token."""
        queries: list[Tensor] = []
        thread = threading.get_ident()

        def note(module: nn.Module, args: Any, out: Tensor) -> None:
            if threading.get_ident() == thread:
                queries.append(out[:, -1:])

        handles = [
            attention.get_submodule("q_proj").register_forward_hook(note)
            for attention in self.adapter.text_attentions(self.model)
        ]
        try:
            yield queries
        finally:
            for handle in handles:
                handle.remove()

    def _last_rows(
        self, cache: DynamicCache, queries: list[Tensor], position_1: Tensor
    ) -> list[Tensor]:
        """Attention of the last token to all slots in every layer, float32 [H, S] each."""
        rotation = self.text.rotary_emb(queries[0], position_1.unsqueeze(-2).to(queries[0].device))
        attentions: Any = self.adapter.text_attentions(self.model)
        layers: Any = cache.layers
        rows = []
        for attention, query, layer in zip(attentions, queries, layers, strict=True):
            q_1H1d, _ = project_text_qk(attention, query, None, rotation)
            rows.append(ops.attention_rows(q_1H1d, layer.keys, scale=attention.scaling)[0, :, 0])
        return rows

    def _pick(self, rows: list[Tensor], step: StreamStep) -> list[Tensor]:
        """What stays of one frame in every layer, bool [L]."""
        kept, num_new = [], len(step.kept_L)
        for layer, row_HS in enumerate(rows):
            picked_K = self.memory.pick(layer, row_HS[:, -num_new:], step.kept_L)
            kept.append(step.kept_L.index_fill(0, picked_K, True))
        return kept


def _language_adapter(model: nn.Module) -> Adapter:
    adapter = adapter_for(model)
    if not isinstance(adapter, Adapter):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder alone; a stream needs a vision-language model."
        )
    return adapter


def stream_modality(model: nn.Module) -> Modality:
    """As what the frames of a model are read one by one: as images, or as a video's planes.

    Raises:
        UnsupportedModelError: they cannot be.
    """
    adapter = _language_adapter(model)
    if adapter.stream_modality is None:
        raise UnsupportedModelError(
            f"{adapter.docs_name} puts text, tiles or packed rows between its frames, which a "
            "stream does not. Take LLaVA, LLaVA-NeXT-Video, LLaVA-OneVision, Video-LLaVA, Qwen2-VL "
            "or Qwen2.5-VL."
        )
    return adapter.stream_modality


def _check_clock(name: str, memory: StreamMemory, renumber: bool) -> None:
    """What cannot be done where tokens are numbered by time, row and column."""
    if not isinstance(memory, RecentMemory):
        raise AttachmentError(
            f"{name} numbers its tokens by time, row and column (M-RoPE), which tokens that a "
            "memory makes itself do not have; remember the most recent frames instead (recipe=None "
            "or one that only shortens frames, with capacity=)."
        )
    if not renumber:
        raise AttachmentError(
            f"{name} numbers its tokens by time, row and column (M-RoPE), and time begins at the "
            "first frame that is remembered: keys are always turned; leave out renumber=False."
        )


def _check_text(text: Any, renumber: bool) -> None:
    config = text.config
    if config._attn_implementation not in ("sdpa", "eager"):
        raise AttachmentError(
            f"A stream needs attention masks of its own, which {config._attn_implementation} does "
            'not take; load the model with attn_implementation="sdpa".'
        )
    layers = [t for t in getattr(config, "layer_types", None) or () if t != "full_attention"]
    rotary = getattr(text, "rotary_emb", None)
    kind = getattr(rotary, "rope_type", "default")
    if layers or rotary is None or kind in _MOVING:
        what = f"{layers[0]} layers" if layers else f"positions of the kind {kind!r}"
        raise UnsupportedModelError(
            f"This language model has {what}, which count slots or lengths that a stream does not "
            "have; only full attention with fixed rotary frequencies is supported."
        )
    if renumber and not math.isclose(float(getattr(rotary, "attention_scaling", 1.0)), 1.0):
        raise UnsupportedModelError(
            "The rotary positions of this language model scale its keys, so that they cannot be "
            "turned to other positions; use renumber=False."
        )


def _stop_ids(model: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    return frozenset(() if found is None else [found] if isinstance(found, int) else found)
