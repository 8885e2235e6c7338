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
    if tower.pool is not None:
        PooledTokens(tower.pool, last, run).install(handles)
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
    """Hooks that make the mean of merged tokens the mean of the patches they stand for.

    The mean is taken inside a method of the encoder, which no hook sees, so it is taken once more
    where it arrives. Only if what arrives is the mean of the last call's tokens: whoever calls the
    head with others gets what they call for.

    Args:
        pool: the head.
        end: the module whose output the head reads.
        run: gives the running call.
    """

    def __init__(
        self, pool: TokenPool, end: nn.Module, run: Callable[[], EncoderRun | None]
    ) -> None:
        self.pool, self.end, self.run = pool, end, run
        self._local = threading.local()

    def install(self, handles: list[Any]) -> None:
        """Register the hooks, adding them to `handles`."""
        handles.append(self.end.register_forward_hook(self._left))
        handles.append(self.pool.module.register_forward_pre_hook(self._pooled))

    def _left(self, module: nn.Module, args: tuple, output: torch.Tensor) -> None:
        run, self._local.last = self.run(), None
        weight_BM = token_weights(run)
        if run is None or weight_BM is None:
            return
        is_ragged = run.tokens is not None and run.tokens.mask_BN is not None
        # Weak: nobody may need the features any more, and this must not keep them.
        self._local.last = weakref.ref(output), weight_BM, is_ragged

    def _pooled(self, module: nn.Module, args: tuple) -> Any:
        last, self._local.last = getattr(self._local, "last", None), None
        if last is None or (x_BMC := last[0]()) is None:
            return None
        _, weight_BM, is_ragged = last
        if not self.pool.is_mean:
            if is_ragged:
                raise AttachmentError(
                    "The images of this call differ in length, and the head of this encoder would "
                    "read the padding: pass restore=True, call forward_features() and pool its "
                    "tokens yourself, or use a method that keeps as many of every image."
                )
            return None
        x_BMC, weight_BM = x_BMC[:, self.pool.first :], weight_BM[:, self.pool.first :]
        if not torch.equal(args[0], x_BMC.mean(dim=1)):
            return None
        share_BM = weight_BM / weight_BM.sum(1, keepdim=True)
        return (torch.einsum("bm,bmc->bc", share_BM.to(x_BMC.dtype), x_BMC), *args[1:])


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
