"""Attention inside encoder blocks: sizes added to its logits, and what methods compute themselves.

A method that computes attention gets the queries, keys and values of the block's own kernel. Where
that is torch's fused one on a CPU, the method is asked in its place; elsewhere the kernel runs as
ever, and the output projection behind it is handed what the method made instead.

Legend: B images of a call, H heads, N tokens present, d channels of a head.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from foveate.attach.encoder_run import EncoderRun
from foveate.attach.single import OfOneModel
from foveate.core import EncoderContext, Method
from foveate.core.method import overrides
from foveate.errors import AttachmentError
from foveate.models.tower import VisionTower

_KERNEL = torch.nn.functional.scaled_dot_product_attention
#: What attention modules call the mask that is added to their logits: in transformers, in timm.
MASKS = ("attention_mask", "attn_mask")


def rewriting(steps: list[tuple[int, Method]]) -> list[tuple[int, Method]]:
    """The steps that compute attention themselves."""
    return [(number, m) for number, m in steps if overrides(m, "encoder_attention")]


def outside_reader(
    run: EncoderRun, tower: VisionTower, block: int
) -> Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None:
    """Gives the keys and values of tokens outside the sequence, and counts what they cost.

    None where the encoder does not say where it makes them.
    """
    if tower.packed or not tower.attention_inputs:
        return None

    def read(x_BNC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images, tokens = x_BNC.shape[:2]
        run.outside.append((images, run.attention_lengths[-1], tokens))
        return tower.keys_values(block, x_BNC)

    return read


def answer(
    asked: list[tuple[Method, EncoderContext]], shape: tuple[int, ...]
) -> torch.Tensor | None:
    """What the methods make of a block's attention, [B, H, N, d]; None: they leave it.

    Raises:
        ValueError: it is not of `shape`, [B, N, H * d].
    """
    found_BHNd = None
    for method, context in asked:
        with torch.no_grad():
            out_BHNd = method.encoder_attention(context)
        if out_BHNd is None:
            continue
        B, H, N, d = out_BHNd.shape
        if (B, N, H * d) != shape:
            raise ValueError(
                f"{method.name}: encoder_attention() returns [B, H, N, d] for {shape} (heads "
                f"joined), got {tuple(out_BHNd.shape)}."
            )
        found_BHNd = out_BHNd
    return found_BHNd


class Rewriting(OfOneModel):
    """What asks the methods that compute attention, in one block.

    Args:
        tower: the encoder.
        run: gives the running call.
        contexts: gives the methods to ask in it, with what each may read.
    """

    def __init__(
        self,
        tower: VisionTower,
        run: Callable[[], EncoderRun | None],
        contexts: Callable[[EncoderRun], list[tuple[Method, EncoderContext]]],
    ) -> None:
        self.tower, self.run, self.contexts = tower, run, contexts
        self.width = tower.num_heads * tower.head_dim

    def asking(self, x_BND: torch.Tensor) -> Callable[[], torch.Tensor | None] | None:
        """What is to be asked in the place of the fused kernel, see `size_hook`."""
        run = self.run()
        if run is None or run.restored or run.packing is not None:
            return None
        run.answered = False
        # Elsewhere the kernel is faster than anything beside it, or gradients run through it.
        fused = getattr(getattr(self.tower.module, "config", None), "_attn_implementation", "")
        if fused != "sdpa" or x_BND.device.type != "cpu" or torch.is_grad_enabled():
            return None

        def ask() -> torch.Tensor | None:
            run.answered = True
            asked = [(m, replace(c, in_place=True)) for m, c in self.contexts(run)]
            return answer(asked, (*x_BND.shape[:2], self.width))

        return ask

    def before_output(self, module: nn.Module, args: tuple) -> Any:
        """A pre-hook for the projection behind attention, whose kernel has run."""
        run, (own_BNC, *rest) = self.run(), args
        if run is None or run.restored or run.answered:
            return None
        out_BHNd = answer(self.contexts(run), tuple(own_BNC.shape))
        if out_BHNd is None:
            return None
        return (out_BHNd.transpose(1, 2).flatten(2).to(own_BNC.dtype), *rest)


class AskingMask(torch.Tensor):
    """A mask of attention that asks methods when the fused kernel is called with it.

    Such a tensor is how a call of the kernel can be answered from hooks, without another attention
    function and without running it in vain.

    Attributes:
        ask: gives what takes the place of the kernel's result, [B, H, N, d]; None: nothing does.
        weighs: it is a mask; else it only carries `ask`.
    """

    ask: Callable[[], torch.Tensor | None]
    weighs: bool

    @classmethod
    def carrying(
        cls, mask: torch.Tensor | None, x_BND: torch.Tensor, ask: Callable
    ) -> torch.Tensor:
        """A mask, or one that hides nothing from N tokens, that asks."""
        zeros_111N = x_BND.new_zeros(1, 1, 1, x_BND.shape[1])
        made = (zeros_111N if mask is None else mask).as_subclass(cls)
        made.ask, made.weighs = ask, mask is not None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not _KERNEL:
            out = super().__torch_function__(func, types, args, kwargs)
            source = next((x for x in args if isinstance(x, cls)), None)
            if isinstance(out, cls) and source is not None and hasattr(source, "ask"):
                out.ask, out.weighs = source.ask, source.weighs  # a slice, or another dtype
            return out
        names = ("query", "key", "value", "attn_mask")
        named: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
        mask = named["attn_mask"]
        out_BHNd = mask.ask()
        if out_BHNd is not None:
            return out_BHNd.to(named["query"].dtype)
        named["attn_mask"] = mask.as_subclass(torch.Tensor) if mask.weighs else None
        return _KERNEL(**named)


def size_hook(
    attention: nn.Module,
    bias: Callable[[torch.dtype], torch.Tensor | None],
    flash: str,
    asking: Callable[[torch.Tensor], Callable[[], torch.Tensor | None] | None] | None = None,
) -> Callable[[nn.Module, tuple, dict[str, Any]], Any]:
    """A pre-hook that adds the sizes of tokens to the logits of a block's attention.

    Args:
        attention: the module, for the names of its arguments.
        bias: gives what to add in the running block, None for nothing.
        flash: name of a kernel that takes no mask, empty for others.
        asking: for the input of the running block, gives what is to be asked in the place of the
            fused kernel; None where that runs as ever.
    """
    accepted = list(inspect.signature(attention.forward).parameters)
    mask = next((name for name in MASKS if name in accepted), "")
    position = accepted.index(mask) if mask else None

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        x_BND = args[0] if args else kwargs["hidden_states"]
        added = bias(x_BND.dtype)
        ask = asking(x_BND) if asking is not None and position is not None else None
        if ask is not None:
            added = AskingMask.carrying(added, x_BND, ask)
        if added is None:
            return None
        if position is None:
            raise AttachmentError(
                f"{type(module).__name__} takes no attention mask in this release of its "
                "library, so merged tokens cannot weigh more in attention and images "
                "cannot differ in length: upgrade it, or pass prop_attn=False (tome) "
                "or batch_max=True (flowcut)."
            )
        if flash:
            raise AttachmentError(
                f"{flash} takes no padding mask, and the images of this call differ in "
                "length inside the encoder: pass batch_max=True (flowcut), or load the encoder "
                'with attn_implementation="sdpa".'
            )
        if position < len(args):
            _refuse_mask(args[position])
            return (*args[:position], added, *args[position + 1 :]), kwargs
        _refuse_mask(kwargs.get(mask))
        return args, {**kwargs, mask: added}

    return hook


def _refuse_mask(mask: torch.Tensor | None) -> None:
    if mask is not None:
        raise AttachmentError(
            "These images carry a padding mask inside the encoder; encoder-stage methods need "
            "images without padding. Resize them to one shape, or use a projector-stage method."
        )
