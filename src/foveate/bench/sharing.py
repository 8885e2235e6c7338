"""Questions about one clip share the work of its encoder.

A batch holds the pixels of a clip once per question, because every model and every method expects
one item per question. Inside the encoder those rows stay equal, so a module needs to see only one
of them. The rows are compared before every use: where a method makes them differ (by lot, or by the
question), the module runs on all of them.

Legend: R rows of a batch (questions times images of a clip, or times tokens of a packed encoder), U
of them that are different.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from foveate.bench.model import language_adapter

_RECORDERS = "transformers.utils.output_capturing"


class SharedEncoder:
    """Runs the modules of a model's encoders once per clip.

    Args:
        model: a model that answers questions.

    Example:
        >>> shared = SharedEncoder(model)                                   # doctest: +SKIP
        >>> with shared.over(["a", "a", "b"]):  # three questions, two clips # doctest: +SKIP
        ...     model.generate(**inputs)
    """

    def __init__(self, model: nn.Module) -> None:
        towers = language_adapter(model).towers(model)
        self.towers = list({id(tower): tower for tower in towers.values()}.values())

    @contextmanager
    def over(self, clips: Sequence[Hashable]) -> Iterator[None]:
        """While it lasts, rows of questions about the same clip are computed once.

        Enter it with the hooks of an attachment in place: a block is shared as a whole where no
        hook reads what happens inside of it, else its single modules are, so that every hook sees
        the rows of all questions.

        Args:
            clips: what tells the clip (and its frames) of every question of the batch, in order.
        """
        first: dict[Hashable, int] = {}
        for number, clip in enumerate(clips):
            first.setdefault(clip, number)
        if len(first) == len(clips):
            yield
            return
        place = {clip: number for number, clip in enumerate(first)}
        unique, inverse = list(first.values()), [place[clip] for clip in clips]
        modules = [m for tower in self.towers for m in _shareable(tower.module, tower.packed)]
        kept = [module.__dict__.get("forward") for module in modules]
        for module in modules:
            module.__dict__["forward"] = _shared(module.forward, unique, inverse)
        try:
            yield
        finally:
            for module, forward in zip(modules, kept, strict=True):
                if forward is None:
                    del module.__dict__["forward"]
                else:
                    module.__dict__["forward"] = forward


def _shareable(parent: nn.Module, packed: bool) -> list[nn.Module]:
    """Blocks without hooks inside, and single modules elsewhere.

    Blocks of packed encoders get the places of all tokens beside them, so they are taken apart.
    """
    found: list[nn.Module] = []
    is_list = isinstance(parent, nn.ModuleList) and not packed
    for module in parent.children():
        single = next(module.children(), None) is None
        if single or (is_list and not _hooked_inside(module)):
            found.append(module)
        else:
            found += _shareable(module, packed)
    return found


def _hooked_inside(module: nn.Module) -> bool:
    """Whether somebody reads inside; the library's recorders of attention maps are never asked."""
    inner = (child for child in module.modules() if child is not module)
    hooks = (
        hook
        for child in inner
        for hook in (*child._forward_hooks.values(), *child._forward_pre_hooks.values())
    )
    return any(getattr(hook, "__module__", None) != _RECORDERS for hook in hooks)


def _shared(
    forward: Callable[..., Any], unique: Sequence[int], inverse: Sequence[int]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        x_R = args[0] if args else None
        # Another tensor beside it may differ from row to row.
        others = any(isinstance(value, Tensor | tuple) for value in (*args[1:], *kwargs.values()))
        if not isinstance(x_R, Tensor) or others or not x_R.dim() or x_R.shape[0] % len(inverse):
            return forward(*args, **kwargs)
        parts = x_R.unflatten(0, (len(inverse), -1))
        copies = [(number, unique[of]) for number, of in enumerate(inverse) if unique[of] != number]
        if not all(torch.equal(parts[copy], parts[first]) for copy, first in copies):
            return forward(*args, **kwargs)
        x_U = _rows(x_R, unique, len(inverse))
        output = forward(x_U, *args[1:], **kwargs)
        if isinstance(output, tuple):
            return tuple(_expanded(part, x_U, unique, inverse) for part in output)
        return _expanded(output, x_U, unique, inverse)

    return run


def _rows(x: Tensor, chosen: Sequence[int], groups: int) -> Tensor:
    """The rows of the chosen groups, of as many equal groups as `x` has."""
    return x.unflatten(0, (groups, -1))[list(chosen)].flatten(0, 1)


def _expanded(part: Any, x_U: Tensor, unique: Sequence[int], inverse: Sequence[int]) -> Any:
    if not isinstance(part, Tensor) or not part.dim() or part.shape[0] != x_U.shape[0]:
        return part
    return _rows(part, inverse, len(unique))
