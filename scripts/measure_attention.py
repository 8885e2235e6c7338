"""How well the embedded model's own attention finds what questions are about.

python scripts/measure_attention.py [--clips 32]

For every visual token: does it show a sprite (of the exact masks), and how much attention do the
patches it stands for receive in each block of the vision tower, and how much flows through them
(FlowCut), how much does it differ from the frame before, and how far is it from the frame's mean?
Prints, for each score, the probability that a token with a sprite scores above one without (area
under the ROC curve; 0.5 is chance).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch

import foveate
from foveate.attach.tower_tap import TowerTap
from foveate.methods.flowcut import encoder_flow
from foveate.models.registry import adapter_for
from foveate.training.data import AnswerBatches
from foveate.training.packing import frame_tokens
from foveate.training.sizes import SIZES


def area(score_N: torch.Tensor, shown_N: torch.Tensor) -> float:
    """Area under the ROC curve; ties count half."""
    order = score_N.double().argsort()
    rank_N = torch.empty_like(order, dtype=torch.float64)
    rank_N[order] = torch.arange(1, len(order) + 1, dtype=torch.float64)
    hits = int(shown_N.sum())
    others = len(shown_N) - hits
    return float((rank_N[shown_N].sum() - hits * (hits + 1) / 2) / (hits * others))


def _ids(tokenizer: Any, text: str) -> torch.Tensor:
    return torch.tensor(tokenizer.encode(text, add_special_tokens=False))


@torch.inference_mode()
def main(clips: int) -> None:
    """Print one line per score."""
    size = SIZES["small"]
    model, processor = foveate.embedded()
    model.set_attn_implementation({"vision_config": "eager"})
    batch = AnswerBatches(size, 0, clips, split="test", captions=False, labels=True)
    batch.world.natural = 0.0
    made = batch[0]
    frames_BHWC = made["frames"].flatten(0, 1)
    shown_BN = made["tokens"]["kind"] > 0
    _, tokens_BNE = frame_tokens(model, frames_BHWC)
    side = size.image // size.patch
    flows = {}

    def note(block: int) -> Callable:
        def observe(captured: dict, kwargs: dict) -> None:
            q, k = tower.assemble_qk(block, captured, kwargs)
            v = tower.assemble_v(block, captured)
            _, flows[block] = encoder_flow(q, k, v, tower.num_prefix, tower.has_cls)

        return observe

    tower = adapter_for(model).towers(model)["video"]
    for block in range(len(tower.blocks)):
        TowerTap(tower, block, note(block), values=True)
    out = model.model.vision_tower(
        frames_BHWC.movedim(-1, -3).float() / 127.5 - 1, output_attentions=True
    )
    scores = {}

    def pooled(score_BP: torch.Tensor) -> torch.Tensor:
        grid = score_BP.view(-1, side // 2, 2, side // 2, 2).mean(dim=(2, 4))
        return grid.flatten(1)

    for layer, attention_BHPP in enumerate(out.attentions):
        received_BP = attention_BHPP.float().mean(dim=(1, 2))
        scores[f"attention received in block {layer}"] = pooled(received_BP)
    for layer, flow_BP in flows.items():
        scores[f"information flow in block {layer}"] = pooled(flow_BP)
    unit = torch.nn.functional.normalize(tokens_BNE.float(), dim=-1)
    clip_BTNE = unit.view(clips, size.frames, *unit.shape[1:])
    change = 1 - (clip_BTNE[:, 1:] * clip_BTNE[:, :-1]).sum(-1)
    centre = torch.nn.functional.normalize(unit.mean(1, keepdim=True), dim=-1)
    scores["distance to the frame's mean token"] = 1 - (unit * centre).sum(-1)
    scores["length of the token"] = tokens_BNE.float().norm(dim=-1)
    # What methods guided by the text go by without a companion (`text.patch_similarity`).
    table, tokenizer = model.get_input_embeddings(), processor.tokenizer
    asked = [batch.asked(batch.world.sample(index)) for index in range(clips)]
    texts = [[table(_ids(tokenizer, one.text)).mean(0) for one in found] for found in asked]
    guide_BE = torch.stack([torch.stack(found).mean(0) for found in texts])
    guide_BE = torch.nn.functional.normalize(guide_BE.float(), dim=-1)
    alike_BTN = torch.einsum("btne,be->btn", clip_BTNE, guide_BE)
    scores["likeness to the words of the questions"] = alike_BTN.flatten(0, 1)
    print(f"{clips} clips, {shown_BN.float().mean():.1%} of the visual tokens show a sprite")
    for name, score_BN in scores.items():
        print(f"{name:40s} {area(score_BN.flatten(), shown_BN.flatten()):.3f}")
    shown = shown_BN.view(clips, size.frames, -1)
    # What a frame newly shows or no longer shows.
    kind = made["tokens"]["kind"].view(clips, size.frames, -1)
    changed = kind[:, 1:] != kind[:, :-1]
    for name, what in (("showing a sprite", shown[:, 1:]), ("changing content", changed)):
        found = area(change.flatten(), what.flatten())
        print(f"{'difference to the frame before, ' + name:40s} {found:.3f}")
    for tau in (0.65, 0.8, 0.9):
        alike = (change < 1 - tau).float()
        print(
            f"similarity to the frame before above {tau}: {alike[changed].mean():.1%} of the "
            f"tokens whose content changes, {alike[~changed].mean():.1%} of the others"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clips", type=int, default=32)
    main(parser.parse_args().clips)
