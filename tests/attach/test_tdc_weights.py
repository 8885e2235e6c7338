"""TDC with a trained part on models: what it makes is what enters the language model."""

from __future__ import annotations

import pytest
import torch
from attach_suite import model_of, spied
from torch.nn.functional import normalize

import foveate
from foveate.methods.tdc import TDC, TDCWeights
from tiny import Sample, tiny_inputs


def compress(query_fKD: torch.Tensor, x_fLD: torch.Tensor) -> torch.Tensor:
    return normalize(query_fKD + x_fLD.mean(1, keepdim=True), dim=-1)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen3_vl", "video_llava"])
def test_made_tokens_enter_the_prompt(family: str) -> None:
    model = model_of(family)
    inputs = tiny_inputs(family, samples=(Sample(items=("video",), seed=0),))
    width = model.get_input_embeddings().weight.shape[1]
    method = TDC(weights=TDCWeights(compress, torch.full((width,), 0.25)))
    with foveate.reduce(model, method, retain=0.4) as run, spied(model) as seen, torch.no_grad():
        logits = model(**inputs).logits
    (item,) = run.report.items
    made_MD = item.reduction.features_BMD[0]
    assert item.reduction.kind == "synthesise" and item.after == len(made_MD) < item.before
    seps = (made_MD == 0.25).all(1)
    assert 0 < int(seps.sum()) <= len(item.grid.planes)
    embeds_LD = seen["inputs_embeds"][0]
    # Each made token stands in the prompt, in this order.
    place_M = (embeds_LD[:, None] == made_MD).all(-1).int().argmax(0)
    assert embeds_LD[place_M].equal(made_MD)
    assert (place_M[~seps].diff() > 0).all()
    assert logits.isfinite().all()
