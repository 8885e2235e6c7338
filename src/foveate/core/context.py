"""What a method may read at each stage: budget, layout and the signals it declared.

Legend: N visual tokens of one item or sample, S tokens of the whole sequence, R some rows of it,
I visual items of a sample, D channels, H query heads, G key heads, d head channels.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import torch

from foveate.core.budget import Budget
from foveate.core.card import Stage
from foveate.core.dense import DensePrediction
from foveate.core.encoder_attention import EncoderAttentionView
from foveate.core.evidence import EvidenceKind, Notebook
from foveate.core.grid import Grid, Modality
from foveate.core.joining import clip_lengths
from foveate.errors import MissingSignalError

if TYPE_CHECKING:
    from foveate.core.frames import FramePlan

#: The parts of a decoder layer that `Method.observe` sees.
LayerModule = Literal["attention", "mlp"]
#: Where in a vision block an encoder-stage method may act.
EncoderPoint = Literal["block_start", "after_attention", "block_end"]

#: Signals that a projector-stage method can declare in `needs`; all are float32 [1, N] maps in the
#: order of the language model's tokens (pooled, unpadded and merged exactly like the features;
#: newline tokens hold NaN) unless said otherwise.
SIGNALS: dict[str, str] = {
    "encoder.cls_attention": "attention of the [CLS] query to each patch in the block that made "
    "the features, mean over heads",
    "encoder.received_attention": "attention each patch receives in the block that made the "
    "features, mean over heads and patch queries",
    "encoder.pixels": "the pictures of the item's planes, uint8 [planes, 3, h, w], stretched from "
    "the item's darkest value to its brightest; the tokens of a plane divide its picture evenly",
    "text.embeddings": "embeddings of the text tokens of the sample, [1, S_text, D]",
    "text.tokens": "ids of the text tokens of the sample, int64 [1, S_text]",
    "text.segment": "embeddings of the item's own text in an interleaved prompt: the text between "
    "it and the next item, or the nearest there is, [1, S_segment, D]",
    "text.frame_similarity": "cosine of the instruction (the text behind the last visual token) "
    "with every plane of the item, [1, planes], in the space of the companion (a CLIP-like model, "
    "`foveate.Companion`) or, without one, of the language model's embeddings: between the mean "
    "embedding of the instruction's tokens and the mean feature of the plane",
    "text.patch_similarity": "the same with every token of the item; newline and [CLS] tokens hold "
    "NaN",
    "paired.text": "the instruction in that space, [1, E]",
    "paired.frames": "the planes of the item in that space, [1, planes, E]",
    "paired.patches": "the tokens of the item in that space, [1, N, E]; NaN as above",
}


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Queries and keys of one decoder layer for one sample, from which any attention is computed.

    Attributes:
        q_BHSd: rotated queries of this call, [1, H, S, d].
        k_BGTd: rotated keys, earlier turns first, [1, G, T, d] with T >= S.
        scale: softmax scale.
        visual_N: positions of the visual tokens among the S queries, int64 [N].
        v_BGTd: values, [1, G, T, d], where the method sets `reads_values`; else None.
        visible_SS: bool [S, S], which row sees which key of this call where an attention rule says
            so; None: causal.

    Under a rule of unrotated keys, queries and keys have 2 d channels, whose products are the
    logits of either kind.
    """

    q_BHSd: torch.Tensor
    k_BGTd: torch.Tensor
    scale: float
    visual_N: torch.Tensor
    v_BGTd: torch.Tensor | None = None
    visible_SS: torch.Tensor | None = None

    @property
    def num_queries(self) -> int:
        """Tokens of this call, S."""
        return self.q_BHSd.shape[-2]

    @property
    def num_past(self) -> int:
        """Keys that earlier calls left in the cache, T - S."""
        return self.k_BGTd.shape[-2] - self.num_queries

    def queries(self, index_R: torch.Tensor) -> torch.Tensor:
        """Rotated queries of the tokens `index_R`, [1, H, R, d]."""
        return self.q_BHSd[:, :, index_R.to(self.q_BHSd.device)]

    def rows(self, index_R: torch.Tensor) -> torch.Tensor:
        """Attention rows of the queries `index_R`, float32 [1, H, R, S], as the layer has them.

        The columns of earlier turns are part of the softmax and are cut off afterwards. O(R T d).
        """
        from foveate import ops

        index_R = index_R.to(self.k_BGTd.device)
        rows = ops.attention_rows(
            self.queries(index_R),
            self.k_BGTd,
            scale=self.scale,
            row_positions=index_R + self.num_past if self.visible_SS is None else None,
            attn_mask=self._visible_rows(index_R),
        )
        return rows[..., self.num_past :]

    def mean_of_last(self, num: int) -> torch.Tensor:
        """Mean attention of the last `num` tokens to every token, float32 [1, S].

        Mean over heads and those rows, which are never stored: O(num T d).
        """
        from foveate import ops

        first = self.num_queries - num
        sum_BT = ops.attention_column_sums(
            self.queries(torch.arange(first, self.num_queries)),
            self.k_BGTd,
            scale=self.scale,
            causal=self.visible_SS is None,
            attn_mask=self._visible_rows(torch.arange(first, self.num_queries)),
        )
        return sum_BT[:, self.num_past :] / num

    def _visible_rows(self, index_R: torch.Tensor) -> torch.Tensor | None:
        if self.visible_SS is None:
            return None
        return torch.nn.functional.pad(self.visible_SS[index_R], (self.num_past, 0), value=True)

    def last_row(self) -> torch.Tensor:
        """Attention of the last token, float32 [1, H, S]."""
        last = torch.tensor([self.num_queries - 1])
        return self.rows(last)[:, :, 0]


@dataclass(eq=False)
class Context:
    """Common to all stages.

    Attributes:
        budget: the budget of this sample.
        method: registry name, for error messages.
        seed: for methods that draw random numbers; equal seeds give equal choices.
        state: the method's own scratch, alive for one forward call of one sample.
        notebook: takes what the method notes; None: nobody is going to draw it.
        stages: the stages at which the recipe lets the method act; use `acts`.
    """

    budget: Budget
    method: str = ""
    seed: int = 0
    state: MutableMapping[str, Any] = field(default_factory=dict)
    notebook: Notebook | None = None
    stages: tuple[Stage, ...] = ()

    def acts(self, stage: Stage) -> bool:
        """Whether the recipe lets the method act at `stage`, too; True when nothing is known."""
        return not self.stages or stage in self.stages

    def note(
        self,
        name: str,
        value: Any,
        kind: EvidenceKind = "heat",
        caption: str = "",
        at: torch.Tensor | None = None,
    ) -> None:
        """Show people what the method goes by; it is drawn on the frames, and changes nothing.

        Costs nothing unless evidence was asked for: `foveate.reduce(..., evidence=True)`.

        Args:
            name: what it is, in the paper's words ("text attention").
            value: by kind, a tensor or a list; or a function without arguments that gives it and
                is called only if somebody draws. Per token means per token that the stage sees:
                [N] in the projector stage (or one per patch, [P] or [T, L]), [B, prefix + N] in the
                encoder stage, [N] visual tokens in all others.
            kind: "heat", a number per token, NaN for nothing; "label", an integer per token
                (segment, cluster, group), -1 for none; "mark", a bool per token; "frames", pairs
                (first, last) of planes, inclusive; "boxes", (plane, top, left, bottom, right) in
                cells of the grid, bottom and right exclusive. The last two in the projector stage.
            caption: a sentence for people.
            at: the tokens that the value speaks of, where not of all, int64 of its shape; further
                notes of the same name fill in others.

        Raises:
            ValueError: evidence was asked for, and the value has another length or dtype.

        Example:
            >>> seen = []
            >>> book = Notebook("projector", (2,), seen.append)
            >>> context = Context(Budget(0.5), "example", notebook=book)
            >>> context.note("saliency", torch.tensor([0.25, 0.75]))
            >>> seen[0].name, seen[0].value.tolist()
            ('saliency', [0.25, 0.75])
        """
        if self.notebook is not None:
            self.notebook.add(self.method, name, value, kind, caption, at)

    def generator(self, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh generator with this context's seed."""
        return torch.Generator(device).manual_seed(self.seed)


@dataclass(eq=False)
class EncoderContext(Context):
    """Inside a vision encoder, all images of the call as one batch.

    Attributes:
        layer: index of the block, 0-based.
        num_layers: blocks that run.
        point: where in the block the method is asked, see `Method.encoder_point`.
        num_prefix: [CLS] and register tokens at the front of the sequence, those of all joined
            frames together.
        has_cls: the first of them is a [CLS] token.
        num_images: images of the call.
        joined: how many of them a row holds, consecutive frames of one video
            (`Method.encoder_joins`).
        keys_BHNd: keys of this block's attention.
        queries_BHNd: queries of this block's attention.
        values_BHNd: values of this block's attention, where the method sets `reads_values`.
        size_BN: how many tokens each counts for in this block's attention (its log is added to the
            logits, padding counts for none); None: one each.
        plane: rows and columns of the patches of an image; None where pixels do not tell.
        layouts: `layouts()` gives, for every image of the call, the grid of the visual item that it
            belongs to and its plane there (all tiles of a mosaic share one); empty for an encoder
            alone.
        carried: what `carry` noted.
        read_keys_values: the block's keys and values of other tokens; use `keys_values`.
        predictions: what `predict` was given.
        in_place: `Method.encoder_attention` is asked before the fused kernel, which does not run if
            the method answers.
    """

    layer: int = 0
    num_layers: int = 1
    point: EncoderPoint = "after_attention"
    num_prefix: int = 0
    has_cls: bool = False
    num_images: int = 1
    joined: int = 1
    keys_BHNd: torch.Tensor | None = None
    queries_BHNd: torch.Tensor | None = None
    values_BHNd: torch.Tensor | None = None
    size_BN: torch.Tensor | None = None
    plane: tuple[int, int] | None = None
    layouts: Callable[[], Sequence[tuple[Grid, int]]] = tuple
    carried: MutableMapping[str, torch.Tensor] = field(default_factory=dict)
    read_keys_values: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None
    predictions: list[DensePrediction] = field(default_factory=list)
    in_place: bool = False

    def keys_values(self, x_BND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that this block's norm and projections make of tokens, [B, H, N, d] each.

        Of tokens that are not in the sequence, such as those that left before: what
        `Method.encoder_attention` reads may be more than what the block runs on.

        Raises:
            ValueError: there is no block to ask.
        """
        if self.read_keys_values is None:
            raise ValueError(
                f"{self.method} asks for keys and values of tokens outside the sequence, and this "
                "encoder does not say where its blocks make them."
            )
        return self.read_keys_values(x_BND)

    def predict(self, prediction: DensePrediction) -> None:
        """Hand a dense prediction to the user, as `Attachment.dense`; a later one replaces it."""
        self.predictions.append(prediction)

    def carry(self, name: str, value_BP: torch.Tensor) -> None:
        """Hand one number per patch of every image, [B, P], to the same method's projector stage.

        P counts the patches that entered the first block, whatever has become of them
        (`Reduction.restore` spreads numbers of present tokens over them); a later call under the
        same name replaces an earlier one. The numbers go the way of the features, and
        `ProjectorContext.carried_from_encoder(name)` has them per token of the language model.
        """
        self.carried[name] = value_BP

    def video_frames(self, frames: int | None = None) -> int:
        """How many images of the call make up each of its videos; 0: they are no frames.

        Inside a vision-language model the prompt says so.

        Args:
            frames: of each video, for an encoder alone; None: all images of the call are one video.

        Raises:
            ValueError: videos of the call differ in length, or `frames` does not divide its images.

        Example:
            >>> EncoderContext(Budget(0.5), num_images=12).video_frames(4)
            4
        """
        layouts = self.layouts()
        if not layouts:
            frames = self.num_images if frames is None else frames
            if self.num_images % frames:
                raise ValueError(
                    f"{self.method}: {self.num_images} images of a call are no videos of "
                    f"{frames} frames each. Call the encoder with whole videos."
                )
            return frames
        if all(grid.modality != "video" for grid, _ in layouts):
            return 0
        lengths = set(clip_lengths(layouts))
        if len(lengths) > 1:
            raise ValueError(
                f"{self.method} joins frames of a video, and the videos of this call have "
                f"{sorted(lengths)} of them. Give each a call of its own, or as many frames."
            )
        return lengths.pop()


@dataclass(eq=False)
class ProjectorContext(Context):
    """Between encoder and language model, one image or video at a time.

    Attributes:
        grid: layout of the item's tokens.
        item: which of the sample's visual items this is.
        grids: layouts of all of them, in the order of the prompt; empty when unknown.
        read: gives a declared signal or None; use `signal`.
        encoder_layers: the blocks that the method's `encoder_layers` declared, in its order.
        read_encoder: gives the view of a declared block or None; use `encoder_attention`.
        read_carried: gives what the encoder stage carried or None; use `carried_from_encoder`.
        carried: what `carry` noted.
        plan: the frames of a video that a method chose, one entry per plane; None: nobody chose, or
            nobody said so (`Attachment.plans`).
        vocabulary: the language model's head, [..., D] -> [..., words] logits; None: there is none.
    """

    grid: Grid = field(default_factory=lambda: Grid.image(1, 1))
    item: int = 0
    grids: tuple[Grid, ...] = ()
    read: Callable[[str], torch.Tensor | None] = lambda name: None
    encoder_layers: tuple[int, ...] = ()
    read_encoder: Callable[[int], EncoderAttentionView | None] = lambda layer: None
    read_carried: Callable[[str], torch.Tensor | None] = lambda name: None
    carried: MutableMapping[str, torch.Tensor] = field(default_factory=dict)
    plan: FramePlan | None = None
    vocabulary: Callable[[torch.Tensor], torch.Tensor] | None = None

    def carry(self, name: str, value_N: torch.Tensor) -> None:
        """Hand one value per token of the item, [N, ...], to the same method's decoder stage.

        There `DecoderContext.carried(name)` has those of the tokens that are left; an averaged
        token has the value of its anchor.
        """
        self.carried[name] = value_N

    def carried_from_encoder(self, name: str) -> torch.Tensor:
        """What the method's encoder stage carried here, float32 [N] in the order of the tokens.

        Pooled, unpadded and merged exactly like the features, as encoder signals are; newline and
        [CLS] tokens hold NaN.

        Raises:
            ValueError: the encoder stage carried nothing of that name, or did not act.
        """
        value_N = self.read_carried(name)
        if value_N is None:
            raise ValueError(
                f"{self.method} carries no {name!r} from its encoder stage for item {self.item}; "
                f"that stage calls context.carry({name!r}, ...) in every call of the encoder, and "
                "must be part of the same step of the recipe."
            )
        return value_N

    def signal(self, *names: str) -> torch.Tensor:
        """The first of the named signals that this model offers.

        Raises:
            MissingSignalError: the model offers none of them.
            ValueError: there is no signal of that name.
        """
        for name in names:
            value = self.read(_known(name))
            if value is not None:
                return value
        raise MissingSignalError(self.method, names)

    def has(self, name: str) -> bool:
        """Whether the model offers the signal.

        Raises:
            ValueError: there is no signal of that name.
        """
        return self.read(_known(name)) is not None

    def encoder_attention(self, layer: int) -> EncoderAttentionView:
        """Queries, keys and what is made of them of a declared encoder block, for this item.

        Raises:
            MissingSignalError: there is no encoder to read.
            ValueError: the block was not declared.
        """
        if self.encoder_layers and layer not in self.encoder_layers:
            raise ValueError(
                f"The attention of encoder block {layer} was not declared; return it from "
                f"encoder_layers(), which gave {self.encoder_layers}."
            )
        view = self.read_encoder(layer)
        if view is None:
            raise MissingSignalError(self.method, (f"encoder.attention({layer})",))
        return view

    def encoder_attentions(self) -> tuple[EncoderAttentionView, ...]:
        """The views of all declared blocks, in the order in which the method named them.

        Raises:
            MissingSignalError: there is no encoder to read.
        """
        if not self.encoder_layers:
            raise MissingSignalError(self.method, ("encoder.attention",))
        return tuple(map(self.encoder_attention, self.encoder_layers))


@dataclass(eq=False)
class ModuleContext(Context):
    """Right after a module of a decoder layer has run, one sample at a time.

    Attributes:
        layer: the layer that runs, 0-based.
        num_layers: decoder layers.
        module: "attention" or "mlp".
        num_visual: visual tokens of the sample when they entered the language model.
        visual_N: positions of the visual tokens in the sample's sequence, int64 [N].
    """

    layer: int = 0
    num_layers: int = 1
    module: LayerModule = "attention"
    num_visual: int = 0
    visual_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))


@dataclass(eq=False)
class DecoderContext(Context):
    """Before a decoder layer of the language model, one sample at a time.

    Positions count the S tokens of the sample that are left, without padding and without the
    tokens of earlier turns.

    Attributes:
        layer: the layer about to run, 0-based.
        num_layers: decoder layers.
        num_visual: visual tokens of the sample when they entered the language model.
        num_text: other tokens of the sample in this call.
        modalities: what the visual tokens come from ("image", "video"); empty when unknown.
        visual_N: positions of the surviving visual tokens in the sample's sequence, int64 [N].
        attention: `attention(layer)` gives the `AttentionView` of an earlier declared layer over
            the tokens that layer saw; `survivors` maps it to the current tokens.
        survivors: `survivors(layer)` gives the positions that the current sequence's tokens had in
            that layer, int64 [S]; -1 for tokens it did not see.
        attention_ahead: `attention_ahead()` gives the `AttentionView` that the layer about to run
            would have over the current tokens, from its input norm and projections. Queries are
            projected for the rows that are asked for; keys cost one projection of all S tokens.
        hidden: `hidden()` gives the hidden states of the whole sequence, [1, S, D].
        observed: `observed(layer, module)` gives what `Method.observe` returned there, [S, ...] in
            the order of the current tokens; NaN for tokens it did not see.
        carried: `carried(name)` gives what the method's projector stage noted with `carry`, or,
            without such a stage, an encoder signal of its `needs`: [N, ...] in the order of the
            current visual tokens.
        id_S: stable numbers of the current tokens: their places in the prompt that entered the
            language model, int64 [S]; None: as many as there are, in order.
        span_I2: numbers of the first and last token of every visual item as they entered the
            language model, int64 [I, 2]; None: one item, from the first of `visual_N` to the last.
    """

    layer: int = 0
    num_layers: int = 1
    num_visual: int = 0
    num_text: int = 0
    modalities: frozenset[Modality] = frozenset()
    visual_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    attention: Callable[[int], AttentionView] = lambda layer: _no_attention(layer)
    survivors: Callable[[int], torch.Tensor] = lambda layer: torch.empty(0, dtype=torch.long)
    attention_ahead: Callable[[], AttentionView] = lambda: _absent("attention_ahead")
    hidden: Callable[[], torch.Tensor] = lambda: _absent("hidden")
    observed: Callable[[int, LayerModule], torch.Tensor] = lambda layer, module: _absent("observed")
    carried: Callable[[str], torch.Tensor] = lambda name: _absent("carried")
    id_S: torch.Tensor | None = None
    span_I2: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens of the sample that are left, S."""
        return self.num_text + self.visual_N.shape[0]

    @property
    def segment_S(self) -> torch.Tensor:
        """Which item every token belongs to or follows, int64 [S]; -1 before the first item.

        Text between two items belongs to the first of them, as in interleaved prompts.
        """
        id_S, span_I2 = self._layout()
        return torch.searchsorted(span_I2[:, 0].contiguous(), id_S, right=True) - 1

    @property
    def item_N(self) -> torch.Tensor:
        """Which item of the sample every visual token belongs to, int64 [N]."""
        return self.segment_S[self.visual_N]

    @property
    def before_R(self) -> torch.Tensor:
        """Positions of the text before the first visual token (the system prompt), int64 [R]."""
        id_S, span_I2 = self._layout()
        return (id_S < span_I2[0, 0]).nonzero()[:, 0]

    @property
    def after_R(self) -> torch.Tensor:
        """Positions of the text after the last visual token (the instruction), int64 [R]."""
        id_S, span_I2 = self._layout()
        return (id_S > span_I2[-1, 1]).nonzero()[:, 0]

    def last_token_attention(self, layer: int) -> torch.Tensor:
        """Attention of the last token of a declared layer to the present visual tokens.

        Returns:
            float32 [N], mean over heads.
        """
        row_S = self.attention(layer).last_row()[0].mean(0)
        return row_S[self.survivors(layer)[self.visual_N]]

    def _layout(self) -> tuple[torch.Tensor, torch.Tensor]:
        id_S, span_I2 = self.id_S, self.span_I2
        if id_S is None:
            id_S = torch.arange(self.num_tokens, device=self.visual_N.device)
        if span_I2 is None:
            span_I2 = id_S[self.visual_N[[0, -1]]][None]
        return id_S, span_I2


@dataclass(eq=False)
class CacheContext(Context):
    """After a decoder layer's attention, one sample's visual keys and values at a time.

    Attributes:
        layer: the layer whose cache is reduced.
        num_layers: decoder layers.
        position_N3: (time, row, column) of each visual token, [N, 3].
        item_N: which visual item of the sample each token belongs to, int64 [N].
        id_N: stable numbers of the tokens, the same in every layer, int64 [N].
        last_token_attention: `last_token_attention(layer)` gives the attention of the last token of
            a layer declared in `attention_layers` to these tokens, float32 [N], mean over heads.
        attention: gives the `AttentionView` of the layer, where `attention_layers` names it.
        sample: which sample of the batch; rows that beam search adds count as their sample.
        visual_N: positions of the visual tokens among the S tokens that the layer saw, int64 [N].
        column_S: places of those S tokens in the prompt before any reduction, without padding;
            int64 [S], as in `RuleContext`.
        num_columns: tokens of the prompt before any reduction.
    """

    layer: int = 0
    num_layers: int = 1
    position_N3: torch.Tensor = field(default_factory=lambda: torch.empty(0, 3))
    item_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    id_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    last_token_attention: Callable[[int], torch.Tensor] = lambda layer: _no_attention(layer)
    attention: Callable[[], AttentionView] = lambda: _absent("attention")
    sample: int = 0
    visual_N: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    column_S: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    num_columns: int = 0


def _no_attention(layer: int) -> NoReturn:
    raise ValueError(
        f"The attention of layer {layer} was not declared; return it from attention_layers()."
    )


def _absent(name: str) -> NoReturn:
    raise ValueError(f"This context has no {name}(): it was made without a language model.")


def _known(signal: str) -> str:
    if signal not in SIGNALS:
        raise ValueError(f"Unknown signal {signal!r}; known: {', '.join(SIGNALS)}.")
    return signal
