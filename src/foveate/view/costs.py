"""What an encoder alone costs, and what a language model behind it would save."""

from __future__ import annotations

from foveate.core import Recipe, Report
from foveate.core.dims import TransformerDims
from foveate.core.flops import encoder_flops, prefill_flops
from foveate.models.dims import vision_dims
from foveate.view.encoders import Encoded, Encoder

#: The language model of LLaVA-OneVision-7B (Qwen2-7B), to give prefill savings a scale.
REFERENCE_LLM = TransformerDims(28, 3584, 28, 4, 128, 18944, gated=True, vocab=152064)
REFERENCE_NAME = "prefill (reference 7B LLM)"


def count_flops(report: Report, encoder: Encoder, encoded: Encoded) -> None:
    """Fill in `report.flops`: the encoder, and the prefill of the reference model."""
    try:
        dims = vision_dims(encoder.tower.module)
    except ValueError as error:
        report.notes.append(f"FLOPs not counted: {error}")
        return
    images, patches = encoded.x_TPC.shape[:2]
    full = encoder_flops(dims, patches + encoder.tower.num_prefix, images)
    spent = full
    if encoded.runs:
        spent = sum(run.flops(dims) for run in encoded.runs)
    untouched, reduced = {"encoder": float(full)}, {"encoder": float(spent)}
    if any(stage.stage == "projector" for stage in report.stages):
        untouched[REFERENCE_NAME] = float(prefill_flops(REFERENCE_LLM, report.visual_before))
        reduced[REFERENCE_NAME] = float(prefill_flops(REFERENCE_LLM, report.visual_after))
        report.notes.append(
            "prefill FLOPs are not measured: they are what the visual tokens alone would cost in "
            "the language model of LLaVA-OneVision-7B (28 layers, width 3584)"
        )
    for parts in (untouched, reduced):
        parts["total"] = sum(parts.values())
    report.flops = {"untouched": untouched, "reduced": reduced}


def note_missing_stages(recipe: Recipe, report: Report) -> None:
    """Say which stages of the recipe did not run."""
    for name, stage in stages_not_run(recipe):
        report.notes.append(f"{name} at the {stage}: not run, needs a language model")


def stages_not_run(recipe: Recipe) -> list[tuple[str, str]]:
    """(method, stage) of everything in a recipe that acts inside a language model, or on frames."""
    return [
        (step.method.name, stage)
        for step in recipe
        for stage in step.stages
        if stage not in ("patches", "encoder", "projector")
    ]
