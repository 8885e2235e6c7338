"""Both ends of a shortened encoder: heads that pool its tokens, and methods in the way.

Legend: B images, M tokens left, C channels.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from foveate.attach.encoder_run import EncoderRun
from foveate.attach.single import OfOneModel
from foveate.errors import AttachmentError
from foveate.models.tower import TokenPool, VisionTower


def around(
    tower: VisionTower,
    start: Callable[..., Any],
    finish: Callable[..., Any],
    run: Callable[[], EncoderRun | None],
) -> list[Any]:
    """Hooks in front of an encoder and behind it, and for a head that pools what it gives."""
    first, last = tower.start or tower.module, tower.end or tower.module
    handles: list[Any] = [first.register_forward_pre_hook(start, with_kwargs=True)]
    for pool in tower.pools:
        PooledTokens(pool, run).install(handles)
    for module in dict.fromkeys((last, tower.module)):  # the latter also where a block has failed
        handles.append(module.register_forward_hook(finish, always_call=True))
    return handles


def token_weights(run: EncoderRun | None) -> torch.Tensor | None:
    """How many patches each token stands for that leaves the last block, [B, M]; padding: none.

    None: one each.
    """
    if run is None or run.restored or run.tokens is None:
        return None
    size_BM, mask_BM = run.tokens.size_BN, run.tokens.mask_BN
    if size_BM is None:
        return None if mask_BM is None else mask_BM.float()
    return size_BM if mask_BM is None else size_BM * mask_BM


class PooledTokens(OfOneModel):
    """Hooks that have a head pool merged tokens as the patches they stand for.

    A mean is taken inside a method of the model, which no hook sees, so it is taken once more,
    weighted, where it arrives. An attention gets the log of the sizes as its mask. Only if what
    arrives is of the last call's tokens: whoever calls the head with others gets what they call
    for.

    Args:
        pool: the head.
        run: gives the running call.
    """

    def __init__(self, pool: TokenPool, run: Callable[[], EncoderRun | None]) -> None:
        self.pool, self.run = pool, run
        self._local = threading.local()

    def install(self, handles: list[Any]) -> None:
        """Register the hooks, adding them to `handles`."""
        hook = {"mean": self._mean, "attention": self._attention, "other": self._other}
        handles.append(self.pool.source.register_forward_hook(self._left))
        handles.append(
            self.pool.module.register_forward_pre_hook(hook[self.pool.kind], with_kwargs=True)
        )

    def _left(self, module: nn.Module, args: tuple, output: Any) -> None:
        run, self._local.last = self.run(), None
        weight_BM = token_weights(run)
        if run is None or weight_BM is None:
            return
        x_BMC = output if isinstance(output, torch.Tensor) else output[0]
        is_ragged = run.tokens is not None and run.tokens.mask_BN is not None
        # Weak: nobody may need the features any more, and this must not keep them.
        self._local.last = weakref.ref(x_BMC), weight_BM, is_ragged

    def _last(self) -> tuple[torch.Tensor, torch.Tensor, bool] | None:
        """The last call's tokens, what each stands for, and whether some are padding."""
        last, self._local.last = getattr(self._local, "last", None), None
        if last is None or (x_BMC := last[0]()) is None:
            return None
        return x_BMC, *last[1:]

    def _mean(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        last = self._last()
        if last is None or not args or args[0].dim() != 2:
            return None
        x_BMC, weight_BM = last[0][:, self.pool.first :], last[1][:, self.pool.first :]
        # In front of the mean other channels may lie, those of [CLS].
        others_BE, mean_BC = args[0][:, : -x_BMC.shape[2]], args[0][:, -x_BMC.shape[2] :]
        if not torch.equal(mean_BC, x_BMC.mean(dim=1)):
            return None
        share_BM = weight_BM / weight_BM.sum(1, keepdim=True)
        weighted_BC = torch.einsum("bm,bmc->bc", share_BM.to(x_BMC.dtype), x_BMC)
        return (torch.cat([others_BE, weighted_BC], dim=1), *args[1:]), kwargs

    def _attention(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        last = self._last()
        if last is None or len(args) != 3 or kwargs or args[1] is not last[0]:
            return None
        return args, {"key_padding_mask": last[1].log().to(last[0].dtype)}

    def _other(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        last = self._last()
        if last is not None and last[2]:
            raise AttachmentError(
                "The images of this call differ in length, and the head of this encoder would "
                "read the padding: pass restore=True, call forward_features() and pool its "
                "tokens yourself, or use a method that keeps as many of every image."
            )


class Replaced:
    """An attribute of an instance in front of its class's, until `remove()`.

    Example:
        >>> layer = nn.Identity()
        >>> handle = Replaced(layer, "forward", lambda x: x + 1)
        >>> layer(1), handle.remove(), layer(1)
        (2, None, 1)
    """

    def __init__(self, module: nn.Module, name: str, value: Callable[..., Any]) -> None:
        self.module, self.name = module, name
        self.previous = vars(module).get(name)
        vars(module)[name] = value

    def remove(self) -> None:
        """Put back what was there."""
        if self.previous is None:
            vars(self.module).pop(self.name, None)
        else:
            vars(self.module)[self.name] = self.previous


def refusing(module: nn.Module, name: str, active: Callable[[], bool]) -> Replaced:
    """Let a method of an encoder raise while its sequence is being shortened."""
    original = getattr(module, name)

    def refused(*args: Any, **kwargs: Any) -> Any:
        if active():
            raise AttachmentError(
                f"{type(module).__name__}.{name}() hands out the sequences between the blocks as "
                "whole planes, and here they are shorter. Call forward_features(), with "
                "restore=True for every patch; or remove() the recipe first."
            )
        return original(*args, **kwargs)

    return Replaced(module, name, refused)
