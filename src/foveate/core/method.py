"""The base class of all methods.

Legend: N visual tokens in, M out, S tokens of a sample's whole sequence, D channels, G key heads,
d head channels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from foveate.core.budget import Budget
from foveate.core.card import STAGES, Card, Stage
from foveate.core.context import (
    CacheContext,
    DecoderContext,
    EncoderContext,
    EncoderPoint,
    ModuleContext,
    ProjectorContext,
)
from foveate.core.grid import Grid
from foveate.core.reduction import Reduction
from foveate.core.rule import AttentionRule, RuleContext
from foveate.core.search import SearchRange
from foveate.core.storage import CacheStorage
from foveate.core.tokens import Tokens

if TYPE_CHECKING:
    from typing import Self

    from foveate.core.blocks import Blocks, PrefillContext
    from foveate.core.frames import FramePlan, FramesContext
    from foveate.core.patches import PatchesContext
    from foveate.core.stream import RecallMemory, StreamMemory


@dataclass(frozen=True)
class Count:
    """How many tokens a method leaves: `tokens` exactly, or at most when `exact` is False."""

    tokens: int
    exact: bool = True


@dataclass(frozen=True)
class Method:
    """One published system: a frozen dataclass whose fields are its hyper-parameters.

    Override the stages it acts at and nothing else. Each stage returns a `Reduction` or None for
    "leave the tokens alone"; the attachment applies it to features, positions, masks and caches.

    Class attributes:
        card: identity and published settings.
        needs: projector-stage signals; a tuple inside means "the first of these that the model
            has". Only what is declared is computed. A decoder-stage method without a projector
            stage reads encoder signals with `DecoderContext.carried(name)`.
        any_tokens: the projector stage reads tokens only, not `context.grid`, so it can follow
            another projector method that has shortened the item.
        renumbers: after every decoder reduction the remaining tokens get contiguous positions, in
            that layer and all deeper ones; otherwise they keep theirs. M-RoPE models always do.
        reads_values: the views of `attention_layers` and `encoder_layers` hold values, too, and so
            does the context of the encoder stage.
        one_cache_choice: what `cache` returns behind the last layer holds for all layers; it is
            asked behind every layer, to gather evidence, and returns None before.
        interleaves_frames: it deals frames out to encoders of fixed length; the report says what
            became of that.
        encoder_drops: the encoder stage drops patches: attention of later blocks knows nothing of
            them, and a projector that reads the whole grid all the same finds each in the state in
            which it left.
        encoder_optional: the projector stage does without the encoder stage where that is left out
            or cannot act (an encoder that packs all images into one row); only then the blocks that
            `encoder_layers` names are read.
        encoder_point: where the encoder stage acts in a block: "after_attention" (between
            attention and MLP), "block_start" or "block_end"; a tuple of them: at each, and
            `EncoderContext.point` says which it is.

    Example:
        >>> from foveate.core import Card, Method, Reduction
        >>> @dataclass(frozen=True)
        ... class FirstHalf(Method):
        ...     card = Card("first_half", "FirstHalf", "An example", ("projector",), "baseline",
        ...                 "Keeps the first tokens.")
        ...     def projector(self, tokens, context):
        ...         keep = context.budget.count(tokens.num_tokens)
        ...         return Reduction.select(torch.arange(keep), tokens.num_tokens)
        >>> FirstHalf.stages(), FirstHalf().count(Grid.image(4, 4), Budget(retain=0.5)).tokens
        (('projector',), 8)
    """

    card: ClassVar[Card]
    needs: ClassVar[tuple[str | tuple[str, ...], ...]] = ()
    any_tokens: ClassVar[bool] = False
    renumbers: ClassVar[bool] = False
    reads_values: ClassVar[bool] = False
    one_cache_choice: ClassVar[bool] = False
    interleaves_frames: ClassVar[bool] = False
    encoder_drops: ClassVar[bool] = False
    encoder_optional: ClassVar[bool] = False
    encoder_point: ClassVar[EncoderPoint | tuple[EncoderPoint, ...]] = "after_attention"

    @property
    def name(self) -> str:
        """Registry name."""
        return self.card.name

    @property
    def proportional_attention(self) -> bool:
        """Whether encoder blocks after this method add log(size) to their attention logits."""
        return False

    @classmethod
    def stages(cls) -> tuple[Stage, ...]:
        """The stages this class acts at, in the order of data flow.

        Those it overrides; an attention rule and a rotary scale act at the decoder, a storage at
        the cache.
        """
        acts = set(cls.reducing_stages())
        if (
            cls.attention_rule is not Method.attention_rule
            or cls.rotary_scale is not Method.rotary_scale
        ):
            acts.add("decoder")
        if cls.cache_storage is not Method.cache_storage:
            acts.add("cache")
        return tuple(stage for stage in STAGES if stage in acts)

    @classmethod
    def reducing_stages(cls) -> tuple[Stage, ...]:
        """The stages at which this class takes tokens away, in the order of data flow."""
        return tuple(
            stage
            for stage in STAGES
            # A hyper-parameter of somebody else's method may be called "frames", too.
            if callable(getattr(cls, stage, None))
            and getattr(cls, stage) is not getattr(Method, stage, None)
        )

    def arguments(self) -> dict[str, Any]:
        """Fields that differ from their defaults, ready for JSON.

        Example:
            >>> from foveate.core import get_method
            >>> get_method("holitom")(beta=0.5).arguments()
            {'beta': 0.5}
        """
        changed = {}
        for spec in dataclasses.fields(self):
            default = spec.default
            if spec.default_factory is not dataclasses.MISSING:
                default = spec.default_factory()
            value = getattr(self, spec.name)
            if spec.init and value != default:
                changed[spec.name] = value
        return changed

    def with_arguments(self, **arguments: Any) -> Self:
        """A copy with other hyper-parameters.

        Raises:
            ValueError: the method has no such argument.
        """
        known = {f.name for f in dataclasses.fields(self) if f.init}
        unknown = sorted(set(arguments) - known)
        if unknown:
            raise ValueError(
                f"{self.name} has no argument {', '.join(unknown)}; "
                f"it has: {', '.join(sorted(known)) or 'none'}."
            )
        return dataclasses.replace(self, **arguments)

    # -- counting ahead -------------------------------------------------------------------------

    def count(self, grid: Grid, budget: Budget) -> Count:
        """How many tokens of an item reach the language model, before anything runs.

        Serving engines size placeholders with it. The default is what `budget` says; adaptive
        methods return a bound with `exact=False`. `budget` is that of one sample.
        """
        if "projector" not in self.stages():
            return Count(grid.num_tokens)
        return Count(budget.count(grid.num_tokens))

    # -- stages ---------------------------------------------------------------------------------

    def frames(self, context: FramesContext) -> FramePlan | None:
        """Choose the frames of a clip that the model is shown, before they are decoded for it.

        `foveate.choose_frames`, `ask` and `bench` ask it; a model to which the recipe is attached
        sees frames only when they have been chosen. `ProjectorContext.plan` has the answer.
        """
        raise NotImplementedError

    def patches(self, context: PatchesContext) -> torch.Tensor | None:
        """Say which patches of every image enter the encoder, bool [B, P]; None: all of them.

        Asked before the first block, which then runs on those alone. Behind the last one the others
        have the output of the latest frame before them that computed theirs, so the first frame of
        every clip (`PatchesContext.clip_starts`) must enter whole.
        """
        raise NotImplementedError

    def encoder(self, tokens: Tokens, context: EncoderContext) -> Reduction | None:
        """Reduce the sequence of one vision block; tokens [B, prefix + N, D] of all images."""
        raise NotImplementedError

    def encoder_attention(self, context: EncoderContext) -> torch.Tensor | None:
        """Change what the attention of one vision block gives, [B, H, N, d] before its projection.

        Asked in every block, in the place of the fused kernel (`context.in_place`) or behind it;
        the context has queries, keys, values (with `reads_values`) and sizes. None leaves it.
        """
        return None

    def encoder_restore(self, x_BMD: torch.Tensor, context: EncoderContext) -> torch.Tensor | None:
        """Bring what left the last block back to full length, [B, prefix + N, D]; None: un-merge.

        Asked behind the block that makes the features, where full length is wanted; `x_BMD` is the
        sequence there, `context.state` what the method kept. It must be alone in the encoder.
        """
        return None

    def encoder_joins(self, tokens: Tokens, context: EncoderContext) -> int:
        """Say how many consecutive rows become one before a vision block: frames of one video.

        Asked at "block_start", where the method must act; `encoder` gets the joined row then. In
        front are the prefix tokens of its frames, behind them their patches, both in the order of
        the frames. `EncoderContext.video_frames` says what is a video. 1 joins nothing.
        """
        return 1

    def encoder_lora(self, layer: int, num_layers: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Low-rank update of one vision block's queries, keys and values: A [r, D] and B [3 D, r].

        B A x is added to what the projections give, in the order q, k, v. None: there is none.
        """
        return None

    def projector(self, tokens: Tokens, context: ProjectorContext) -> Reduction | None:
        """Reduce one image or video between encoder and language model; tokens [1, N, D]."""
        raise NotImplementedError

    def decoder(self, tokens: Tokens, context: DecoderContext) -> Reduction | None:
        """Reduce one sample's visual tokens before a decoder layer; hidden states [1, N, D].

        N includes newline tokens. Survivors keep their order, and by default their positions.
        """
        raise NotImplementedError

    def cache(
        self, keys_BGNd: torch.Tensor, values_BGNd: torch.Tensor, context: CacheContext
    ) -> Reduction | None:
        """Choose which of one sample's visual keys and values [1, G, N, d] a layer keeps."""
        raise NotImplementedError

    def prefill(self, context: PrefillContext) -> Blocks | None:
        """Say which visual tokens of a sample see one another while the prompt is read.

        A method that overrides it acts before the question is read: its `cache` gets keys before
        rotary positions, must keep as many in every layer, and the text behind the last visual
        token attends to what is left. None leaves the sample alone.
        """
        raise NotImplementedError

    def attention_rule(self, context: RuleContext) -> AttentionRule | None:
        """Change how one sample's tokens attend in the decoder, before its first layer runs.

        Asked once for a prompt with visual tokens, behind the projector stage. The rule reduces
        nothing, goes with the tokens that later stages leave, and holds while decoding. It belongs
        to the decoder stage: "name@cache" leaves it out, and a budget of 1 switches it off.
        """
        return None

    def rotary_scale(self, context: RuleContext) -> float:
        """How far the rotary positions of one sample are stretched (NTK-aware), at least 1.

        Asked once for a prompt with visual tokens on an empty cache, behind the projector stage and
        the attention rules; it holds for as long as the cache lives. It belongs to the decoder
        stage, and a budget of 1 switches it off.
        """
        return 1.0

    def cache_storage(self) -> CacheStorage | None:
        """How the cache of a prompt with visual tokens is stored; None: as the model has it.

        It belongs to the cache stage, and a budget of 1 switches it off.
        """
        return None

    def stream_memory(self) -> StreamMemory | RecallMemory | None:
        """The memory of one stream of frames, made anew for each; None: the method has none.

        `foveate.Stream` asks it. What else the method does is left out there.
        """
        return None

    def observe(
        self, input_1SD: torch.Tensor, output_1SD: torch.Tensor, context: ModuleContext
    ) -> torch.Tensor | None:
        """Note one value per token, [S, ...], of a module of a decoder layer that has just run.

        Asked at `observe_layers`, for self-attention and then the MLP: `input_1SD` is what the
        module read (after the norm), `output_1SD` what it gave (before the residual sum), for all
        S tokens of the sample. Only what is returned is kept; `DecoderContext.observed` has it.
        """
        raise NotImplementedError

    # -- declarations ---------------------------------------------------------------------------

    def encoder_layers(self, num_layers: int, feature_layer: int) -> Sequence[int]:
        """Encoder blocks whose attention `projector` reads, in an order of its own.

        Args:
            num_layers: blocks of the encoder.
            feature_layer: index of the block whose output becomes the features.
        """
        return ()

    def decoder_layers(self, num_layers: int) -> Sequence[int]:
        """Layers before which `decoder` is asked, ascending."""
        return ()

    def attention_layers(self, num_layers: int) -> Sequence[int]:
        """Layers whose queries and keys `decoder` reads, or whose attention `cache` reads."""
        return ()

    def observe_layers(self, num_layers: int) -> Sequence[int]:
        """Layers whose modules `observe` sees."""
        return ()

    def return_layers(self, num_layers: int) -> Sequence[int]:
        """Layers before which tokens that `decoder` removed come back; none: they are gone.

        Parked tokens skip the layers in between and return in the state in which they left.
        """
        return ()

    def search_space(self, share: float) -> Mapping[str, SearchRange]:
        """Arguments whose best values depend on the model, and where `foveate tune` looks for them.

        Args:
            share: fraction of visual tokens kept, for ranges that depend on it.

        Example:
            >>> from foveate.core import get_method
            >>> get_method("pyramiddrop")().search_space(0.25)
            {'parts': SearchRange(low=2, high=8, integer=True, log=False)}
        """
        return {}

    def check(self, num_encoder_layers: int | None, num_layers: int | None) -> None:
        """Raise `ValueError` when the hyper-parameters do not fit a model of this depth.

        The default asks for the decoder layers, which a method resolves there.
        """
        if num_layers is not None:
            self.decoder_layers(num_layers)


def overrides(method: Method, *hooks: str) -> bool:
    """Whether a method has one of these hooks of its own.

    Example:
        >>> from foveate.core import get_method
        >>> overrides(get_method("vista_llama")(), "attention_rule", "decoder")
        True
    """
    return any(getattr(type(method), hook) is not getattr(Method, hook) for hook in hooks)


def relative_layer(layer: int | float, num_layers: int, name: str = "layer") -> int:
    """A layer index from a whole number or from a depth in (0, 1).

    Published layer numbers hold for one model; a fraction carries them to any depth. It is rounded
    to the nearest layer, at most to the last.

    Raises:
        ValueError: the layer does not exist.

    Example:
        >>> relative_layer(18, 28), relative_layer(18 / 28, 4), relative_layer(0.99, 4)
        (18, 3, 3)
    """
    if 0 < layer < 1:
        return min(round(layer * num_layers), num_layers - 1)
    index = -1 if isinstance(layer, bool) or layer != layer // 1 else int(layer)
    if not 0 <= index < num_layers:
        raise ValueError(
            f"{name} = {layer} does not exist in a model with {num_layers} layers; "
            "give an index below that or a fraction of the depth in (0, 1)."
        )
    return index


def blocks_run(depth: int | float, num_layers: int) -> int:
    """Blocks that have run at a depth given as their number, or as a fraction in (0, 1).

    A fraction is rounded, to one block at least; whether there are so many is for the caller.

    Example:
        >>> blocks_run(6, 12), blocks_run(0.5, 12), blocks_run(1 / 12, 4)
        (6, 6, 1)
    """
    return max(1, round(depth * num_layers)) if depth < 1 else int(depth)
