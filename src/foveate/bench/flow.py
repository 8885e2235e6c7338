"""How much of what a model makes of a prompt survives a reduction: last-token information flow.

Legend: K samples, B of them in a batch, L padded prompt length, D channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach import reduce
from foveate.bench.generation import Generator
from foveate.bench.inputs import Prompts
from foveate.bench.model import language_adapter
from foveate.core import Recipe


class InformationFlow:
    """Last hidden states of the last prompt tokens, untouched and reduced.

    Everything that the model will say depends on the prompt through that state and the cache, so a
    state that a reduction leaves alone is an answer that it leaves alone. No label is needed.

    Args:
        model: without an attachment.
        prompts: the samples.
        batch: samples that run together.
        seed: of methods that draw at random.

    Source: VFlowOpt, section on visual information flow (arXiv 2508.05211).
    """

    def __init__(self, model: nn.Module, prompts: Prompts, batch: int = 16, seed: int = 0) -> None:
        self.model, self.prompts, self.seed = model, prompts, seed
        self.batches = prompts.batches(batch)
        self.generator = Generator(model, prompts, 1)
        self.language_model = language_adapter(model).language_model(model)

    def states(self, recipe: Recipe | None = None, retain: float = 1.0) -> Tensor:
        """States behind the last norm, float32 [K, D], one forward a batch.

        Args:
            recipe: what to reduce with; None: the untouched model.
            retain: its budget.
        """
        if recipe is None:
            return self._run()
        with reduce(self.model, recipe, retain=retain, seed=self.seed):
            return self._run()

    def _run(self) -> Tensor:
        seen: list[Tensor] = []

        def keep(module: nn.Module, args: tuple, output: Any) -> None:
            last_BLD = output[0] if isinstance(output, tuple) else output.last_hidden_state
            # Prompts are padded on the left, so every sample's last token is in the last column.
            seen.append(last_BLD[:, -1].float().cpu())

        handle = self.language_model.register_forward_hook(keep)
        try:
            for batch in self.batches:
                inputs = self.prompts.collate(batch)
                with self.generator.shared.over([prompt.item.clip_id for prompt in batch]):
                    self.generator.generate(inputs, 1)
        finally:
            handle.remove()
        return torch.cat(seen)


def mean_cosine(full_KD: Tensor, reduced_KD: Tensor) -> float:
    """Mean cosine between states of the untouched and the reduced model; NaN counts 0.

    Example:
        >>> full = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> mean_cosine(full, torch.tensor([[3.0, 0.0], [torch.nan, 0.0]]))
        0.5
    """
    cosine_K = nn.functional.cosine_similarity(full_KD.double(), reduced_KD.double(), dim=1)
    return float(cosine_K.nan_to_num(0.0).mean())
