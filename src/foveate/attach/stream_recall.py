"""A stream whose past is called back by the question: watch without the language model, then read.

While frames come, only the encoder and the projector run, and a memory keeps what they made. A
question is compared with it; what fits is read into a fresh cache behind the system prompt, and the
question behind that.

Legend: T frames of a group, L tokens, C channels of the space of text and pictures, h, w pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from foveate import ops
from foveate.attach.stream_cache import StreamCache
from foveate.attach.streaming import StreamEngine
from foveate.core import Budget, Recipe
from foveate.core.stream import FrameGroup, Recall, RecallMemory, RecentMemory, StreamStep
from foveate.errors import AttachmentError
from foveate.models.companion import Companion
from foveate.models.registry import adapter_for


class RecallEngine(StreamEngine):
    """One stream on one model whose memory is asked.

    Not safe for use from several threads at once.

    Args:
        model: a model of a family whose frames can be read one by one, without M-RoPE.
        system_ids: int64 [C], the prompt before the first frame.
        memory: keeps what was seen.
        recipe: methods that shorten every group before the memory sees it; None: none.
        budget: of that recipe.
        companion: gives the space in which frames and questions are compared; None: that of the
            language model's embeddings, as for methods on a prompt.

    Raises:
        UnsupportedModelError: the frames of this family cannot be read one by one.
        AttachmentError: the model numbers tokens by time, row and column, the recipe cannot act on
            it, or its attention takes no masks.

    Attributes:
        frames: numbers of the remembered frames, ascending, without those forgotten.
    """

    def __init__(
        self,
        model: nn.Module,
        system_ids: Tensor,
        memory: RecallMemory,
        recipe: Recipe | None = None,
        budget: Budget | None = None,
        companion: Companion | None = None,
    ) -> None:
        adapter = adapter_for(model)
        if getattr(adapter, "mrope", False):
            raise AttachmentError(
                f"{type(model).__name__} numbers its tokens by time, row and column (M-RoPE), "
                "which summaries of clips do not have; take a model of the LLaVA line, or remember "
                "the most recent frames (recipe=None)."
            )
        # Nothing is ever read into the cache of the stream: it stays the system prompt's.
        super().__init__(model, system_ids, RecentMemory(1), recipe, budget, renumber=False)
        self.recalling, self.companion = memory, companion

    @property
    def num_bytes(self) -> int:
        """Keys and values of the system prompt, and what the memory keeps."""
        return self.cache.num_bytes + self.recalling.num_bytes

    @torch.inference_mode()
    def push(
        self,
        inputs: Mapping[str, Tensor],
        seconds: Sequence[float] | None = None,
        pixels_T3hw: Tensor | None = None,
    ) -> None:
        """Let the memory see one group of frames.

        Args:
            inputs: as the feature method takes them.
            seconds: not used.
            pixels_T3hw: uint8, the same frames for the companion.
        """
        x_LD, frame_L, present_T, ids, num_planes = self._see(inputs)
        group = FrameGroup(
            x_LD,
            frame_L,
            self.features.place_L2,
            self.features.shape_T2[present_T],
            tuple(ids),
            self._keys(x_LD, frame_L, present_T, pixels_T3hw),
        )
        self.num_frames += num_planes
        if ids:
            forgotten = self.recalling.push(group)
            self.frames.extend(ids)
            del self.frames[:forgotten]
        self.broken = False

    @torch.inference_mode()
    def recall(self, ids: Tensor) -> Recall:
        """What fits a question.

        Args:
            ids: int64 [x], the prompt behind the last frame, as for `answer`.
        """
        if self.companion is None:
            text_1C = self._embed(ids).float().mean(0, keepdim=True)
        else:
            text_1C = self.companion.embed_text(self.companion.decode(ids.tolist()))
        return self.recalling.recall(text_1C)

    @torch.inference_mode()
    def answer(
        self,
        ids: Tensor,
        max_new_tokens: int,
        on_token: Callable[[int], None] | None = None,
        recalled: Recall | None = None,
    ) -> tuple[list[int], list[float]]:
        """Read what fits a question, then the question; decode greedily, and leave no trace.

        Args:
            ids: int64 [x], the prompt behind the last frame.
            max_new_tokens: longest answer.
            on_token: called with every new token.
            recalled: what to read; None: what fits the whole of `ids`.

        Returns:
            New tokens without the one that ends them, and how the question's last token spreads its
            attention over the frames that were called back, those of `Recall.number_L` (mean over
            layers and heads; adds up to 1).
        """
        recalled = self.recall(ids) if recalled is None else recalled
        watched = self.cache
        self.cache = self._read_recalled(recalled)
        try:
            return super().answer(ids, max_new_tokens, on_token)
        finally:
            self.cache = watched

    def _keys(
        self, x_LD: Tensor, frame_L: Tensor, present_T: Tensor, pixels_T3hw: Tensor | None
    ) -> Tensor:
        """Every frame as a whole in the space of text and pictures, float32 [T, C]."""
        if self.companion is not None:
            if pixels_T3hw is None:
                raise ValueError("The companion needs the frames themselves: pass pixels_T3hw.")
            return self.companion.embed_pictures(pixels_T3hw[present_T.cpu()])[0]
        # Newlines and [CLS] tokens are no part of what is compared, as on a prompt.
        frame_L = frame_L.where(self.features.place_L2[:, 0] >= 0, -1)
        return ops.scatter_mean(x_LD.float()[None], frame_L[None], len(present_T))[0]

    def _read_recalled(self, recalled: Recall) -> StreamCache:
        """A cache of the system prompt and what was called back."""
        store = StreamCache(self.cache.layers, renumber=False)
        device = self.cache.entry_S.device
        x_LD, number_L = recalled.x_LD.to(device), recalled.number_L.to(device)
        if not len(x_LD):
            return store
        frame_T, frame_L = number_L.unique_consecutive(return_inverse=True)
        cache = store.open(self.text.rotary_emb)
        self._forward(x_LD, cache)
        kept_L = torch.ones_like(frame_L, dtype=torch.bool)
        everyone = torch.arange(len(frame_T), device=device)
        # Read in one go, each token behind all before it: who sees whom is not asked of this step.
        sees_TE = kept_L.new_zeros(len(frame_T), len(frame_T))
        step = StreamStep(x_LD, frame_L, kept_L, sees_TE, everyone)
        position_L = store.num_system + torch.arange(len(x_LD), device=device)
        store.commit(cache, step, position_L, [kept_L] * len(store.layers))
        return store
