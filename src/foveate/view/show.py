"""What `foveate show` does: a clip through an encoder and a recipe, without a language model.

Legend: T frames, P patches of a frame, N = T * P patches of the video, M tokens left, C channels.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from foveate.attach.backbone import check_kinds
from foveate.attach.encoder_joining import joins
from foveate.attach.features import carried_maps
from foveate.attach.noting import encoder_evidence
from foveate.attach.prompt import PromptReducer
from foveate.attach.reporting import describe_budget
from foveate.attach.sequence import VisualItem
from foveate.attach.tower_tap import ItemEncoder
from foveate.core import (
    Budget,
    Evidence,
    Grid,
    ItemReport,
    Method,
    Modality,
    Plane,
    Recipe,
    Reduction,
    Report,
    StageReport,
)
from foveate.errors import DamagedVideoWarning, RecipeError
from foveate.models import adapter_for
from foveate.video import Clip
from foveate.video.sampling import sample_ranks
from foveate.view.costs import count_flops, note_missing_stages
from foveate.view.encoders import Encoded, Encoder, EncoderPass, load_encoder
from foveate.view.sources import picture_sized

#: Told (what, done, total) while something takes long.
Progress = Callable[[str, int, int], None]

_DECODE_CHUNK = 64
#: Stages that run without a language model.
_SHOWN = ("patches", "encoder", "projector")


def show_video(
    source: Any,
    recipe: Recipe | Method | str | Iterable[Method] = "holitom",
    *,
    retain: float | None = None,
    tokens: int | None = None,
    encoder: Encoder | str | Path | None = None,
    frames: int = 32,
    size: int | None = None,
    pool: bool | None = None,
    device: str | torch.device = "cpu",
    batch: int = 8,
    seed: int = 0,
    progress: Progress | None = None,
    **arguments: Any,
) -> Report:
    """Reduce a real clip on a real encoder, up to the language model, and account for it.

    The recipe's encoder stage runs inside the encoder, its projector stage on the patches of all
    frames as one video. Stages inside a language model do not run; the notes say so. An encoder
    alone has no projector, so methods compare its own features. `Report.save("kept.html")` draws
    the result on the frames.

    Args:
        source: what `foveate.Clip` takes, or a clip. A clip of a single picture counts as an image.
        recipe: as in `foveate.reduce`.
        retain: fraction of tokens kept, in (0, 1]; neither this nor `tokens`: the method's default.
        tokens: absolute count kept instead.
        encoder: an `Encoder`, a folder or a hub id; None takes the embedded DINOv2-small.
        frames: frames taken evenly; clips with fewer give all they have.
        size: pixels of the square that frames are scaled to; None: the encoder's own way.
        pool: halve rows and columns bilinearly before the projector stage, as LLaVA-OneVision does
            with videos; None: exactly for videos whose recipe has a projector stage.
        device: where to load an encoder that is given by name.
        batch: frames in one pass of the encoder; all of them for methods that join frames there.
        seed: for methods that draw random numbers.
        progress: told what is being done.
        arguments: hyper-parameters of the recipe's methods.

    Returns:
        A `Report` with one item, its frames and their times; `seconds` has decode, encode, reduce.

    Raises:
        VideoError: the clip cannot be read.
        RecipeError: no stage of the recipe acts before the language model, or a method joins the
            frames of a video and the source is a single picture.
        AttachmentError: a method has a backbone of its own, or needs parts that are trained.
        MissingSignalError: a method reads a signal that the encoder does not offer.
        ValueError: a value is out of range.

    Example:
        >>> from foveate.view import show_video
        >>> report = show_video("holiday.mp4", "holitom", retain=0.15)      # doctest: +SKIP
        >>> report.save("kept.html")                                        # doctest: +SKIP
    """
    made = Recipe.of(recipe, **arguments)
    budget = Budget(retain, tokens)
    budgets = made.budgets(budget)
    _refuse_inside_llm(made)
    if batch < 1:
        raise ValueError(f"batch must be at least 1 frame, got {batch}.")
    tell = progress or (lambda what, done, total: None)
    clip = Clip.open(source)
    if not isinstance(encoder, Encoder):
        tell("load the encoder", 0, 1)
        encoder = load_encoder(encoder, size=size, device=device)
    check_kinds(made, adapter_for(encoder.model))
    modality: Modality = "image" if len(clip) == 1 else "video"
    if joining := [made.steps[i].method for i in made.at("encoder") if joins(made.steps[i].method)]:
        _refuse_picture(joining[0], modality, clip.name)
        batch = frames
    report = Report(_describe(encoder), str(made), describe_budget(budget))
    steps = [(i, made.steps[i].method) for i in made.at("encoder")]
    readers = [made.steps[i].method for i in made.at("projector")]
    gates = [(i, made.steps[i].method) for i in made.at("patches")]
    running = EncoderPass(encoder, _signals(made), steps, budgets, readers, gates)
    shown, seconds = _run(clip, min(frames, len(clip)), running, batch, report, tell)
    if frames > len(clip) and modality == "video":
        report.notes.append(f"the clip has {len(clip)} frames, fewer than the {frames} asked for")
    encoded = running.result()
    begin = time.perf_counter()
    item = _reduce(made, budgets, encoded, modality, pool, seed, encoder, report)
    report.seconds["reduce"] = time.perf_counter() - begin
    item.pixels, item.seconds = lambda: shown, seconds if modality == "video" else None
    report.items = [item]
    count_flops(report, encoder, encoded)
    note_missing_stages(made, report)
    return report


def _refuse_inside_llm(recipe: Recipe) -> None:
    if any(recipe.at(stage) for stage in _SHOWN):
        return
    stages = sorted({stage for step in recipe for stage in step.stages})
    raise RecipeError(
        f"{recipe} acts only at: {', '.join(stages)}, which needs a language model. Use `foveate "
        "ask` with a model, or a recipe with an encoder or projector stage (foveate list)."
    )


def _refuse_picture(method: Method, modality: Modality, name: str) -> None:
    if modality == "image":
        raise RecipeError(
            f"{method.name} joins frames of a video inside the encoder, and {name} is a single "
            'picture: give a video, or a method that acts within a frame, such as "tome".'
        )


def _describe(encoder: Encoder) -> str:
    count = sum(p.numel() for p in encoder.tower.module.parameters())
    return f"{encoder.name or type(encoder.model).__name__}, {count / 1e6:.3g} M parameters"


def _signals(recipe: Recipe) -> set[str]:
    names: set[str] = set()
    for index in recipe.at("projector"):
        for need in recipe.steps[index].method.needs:
            names.update([need] if isinstance(need, str) else need)
    return names


def _run(
    clip: Clip, frames: int, running: EncoderPass, batch: int, report: Report, tell: Progress
) -> tuple[Tensor, list[float]]:
    """Decode and encode chunk by chunk; the frames for pictures and their seconds come back."""
    ranks = sample_ranks(len(clip), frames)
    pictures, seconds, lost = [], [], []
    spent = {"decode": 0.0, "encode": 0.0}
    done = 0
    with running:
        chunk = max(batch, _DECODE_CHUNK)
        for first in range(0, len(ranks), chunk):
            tell("decode", done, frames)
            begin = time.perf_counter()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DamagedVideoWarning)  # it goes into the notes
                taken = clip.take(ranks[first : first + chunk].tolist())
            if taken.damage:
                lost.append(taken.damage.reason)
            seconds += taken.seconds.tolist()
            pictures.append(picture_sized(running.encoder.shown(taken.pixels)))
            spent["decode"] += time.perf_counter() - begin
            for part in taken.pixels.split(batch):
                tell("encode", done, frames)
                begin = time.perf_counter()
                running.add(part)
                spent["encode"] += time.perf_counter() - begin
                done += len(part)
    tell("encode", frames, frames)
    report.seconds.update(spent)
    report.notes += [f"{clip.name}: {reason}" for reason in dict.fromkeys(lost)]
    return torch.cat(pictures), seconds


def _reduce(
    recipe: Recipe,
    budgets: tuple[Budget, ...],
    encoded: Encoded,
    modality: Modality,
    pool: bool | None,
    seed: int,
    encoder: Encoder,
    report: Report,
) -> ItemReport:
    at_projector = recipe.at("projector")
    _note_encoder_stage(recipe, encoded, report)
    x_TPC, (rows, columns), scores = encoded.x_TPC, encoded.shape, encoded.scores
    if not at_projector:
        return _encoder_item(encoded, modality, encoder.tower.num_prefix)
    pooling = modality == "video" if pool is None else pool
    shape = (rows, columns)

    def to_tokens(map_TP: Tensor) -> Tensor:
        """A map of the encoder's patches as the item's tokens have it, [1, N]."""
        map_TP1 = map_TP.float()[..., None]
        return (_pooled(map_TP1, *shape) if pooling else map_TP1).reshape(1, -1)

    if pooling:
        x_TPC = _pooled(x_TPC, rows, columns)
        before = f"{rows} x {columns}"
        rows, columns = -(-rows // 2), -(-columns // 2)
        report.notes.append(
            f"frames pooled from {before} to {rows} x {columns} tokens, as LLaVA-OneVision does"
        )
    grid = Grid((Plane(rows, columns),) * len(x_TPC), modality)
    item = ItemReport(0, modality, grid)
    item.evidence += _encoder_evidence(encoded, to_tokens)
    order_N = torch.arange(grid.num_tokens)
    signals = {name: to_tokens(score_TP)[0] for name, score_TP in scores.items()}
    views = {
        block: replace(view, planes=tuple(range(len(x_TPC))), token_map=to_tokens)
        for block, view in encoded.views.items()
    }
    tower = encoder.tower
    seen = ItemEncoder(len(tower.blocks), tower.feature_block, views.get)
    reducer = PromptReducer(
        steps=[(i, recipe.steps[i].method) for i in at_projector],
        budget=lambda step, sample: budgets[step],
        compact=False,
        seed=seed,
        report=report,
        text_ids=None,
        evidence=True,
        stages={i: tuple(s for s in step.stages if s in _SHOWN) for i, step in enumerate(recipe)},
    )
    carried = carried_maps(
        encoded.runs, lambda map_P: [to_tokens(map_P.view(len(encoded.x_TPC), -1))[0]]
    )
    carried_here = {key: maps[0] for key, maps in carried.items()}
    visual = VisualItem(
        0, modality, grid, order_N, signals, item, encoder=seen, from_encoder=carried_here
    )
    x_1ND = x_TPC.flatten(0, 1)[None]
    reduction = reducer.reduce_item([visual], 0, x_1ND, lambda name: None).reduction
    item.reduction = None if reduction is None else reduction.to("cpu")
    names = " + ".join(recipe.steps[i].method.name for i in at_projector)
    report.stages.append(StageReport("projector", names, (item.before,), (item.after,)))
    report.notes.append(
        "an encoder alone has no projector: similarity is measured on the encoder's own features"
    )
    return item


def _pooled(x_TPC: Tensor, rows: int, columns: int) -> Tensor:
    """Half the rows and columns (rounded up), bilinearly, [T, P, C] -> [T, P', C].

    Source: LLaVA-OneVision, arXiv 2408.03326, section 3.2; `apply_pooling` of transformers.
    """
    x_TChw = x_TPC.transpose(1, 2).unflatten(2, (rows, columns))
    half = (-(-rows // 2), -(-columns // 2))
    pooled = nn.functional.interpolate(x_TChw.float(), size=half, mode="bilinear")
    return pooled.flatten(2).transpose(1, 2).to(x_TPC.dtype)


def _note_encoder_stage(recipe: Recipe, encoded: Encoded, report: Report) -> None:
    if not encoded.runs:
        return
    before = sum(run.num_tokens * run.num_images for run in encoded.runs)
    if recipe.at("patches"):
        names = " + ".join(recipe.steps[i].method.name for i in recipe.at("patches"))
        entered = sum(
            run.num_tokens * run.num_images
            if run.entered is None
            else int(run.entered.counts_B.sum())
            for run in encoded.runs
        )
        report.stages.append(StageReport("patches", names, (before,), (entered,)))
        before = entered
    if recipe.at("encoder"):
        names = " + ".join(recipe.steps[i].method.name for i in recipe.at("encoder"))
        after = sum(sum(run.counts()) for run in encoded.runs)
        report.stages.append(StageReport("encoder", names, (before,), (after,)))
    counts = zip(*(run.tokens_in_blocks() for run in encoded.runs), strict=True)
    report.block_lengths = [sum(block) for block in counts]
    # They were timed as part of the encoding.
    spent = sum(run.seconds for run in encoded.runs)
    report.seconds["encode"] = max(report.seconds["encode"] - spent, 0.0)
    report.seconds["encoder methods"] = spent


def _encoder_evidence(encoded: Encoded, to_tokens: Callable[[Tensor], Tensor]) -> list[Evidence]:
    """What encoder-stage methods noted, carried to the tokens of the one item there is."""
    num = len(encoded.x_TPC)
    (found,) = encoder_evidence(
        encoded.runs, lambda score_P: [to_tokens(score_P.view(num, -1)).flatten()], 1
    )
    return found


def _encoder_item(encoded: Encoded, modality: Modality, num_prefix: int) -> ItemReport:
    """The reductions of frames, or of joined frames, as one of the whole video."""
    plane = Plane(*encoded.shape, prefix=num_prefix)
    grid = Grid((plane,) * len(encoded.x_TPC), modality)
    groups, anchors, sources, targets = [], [], 0, 0
    for run in encoded.runs:
        rows = Reduction.identity(run.num_tokens, run.num_images)
        rows = rows if run.reduction is None else run.reduction.to("cpu")
        for row in range(rows.batch):  # of one frame, or of several that were joined
            one = rows.sample(row)
            group_N, anchor_M = one.groups_BN[0], one.anchor_BM[0]
            groups.append((group_N + targets).where(group_N >= 0, -1))
            anchors.append((anchor_M + sources).where(anchor_M >= 0, -1))
            sources, targets = sources + one.num_in, targets + one.num_out
    item = ItemReport(0, modality, grid)
    item.evidence += _encoder_evidence(
        encoded, lambda map_TP: nn.functional.pad(map_TP, (num_prefix, 0), value=torch.nan)
    )
    if groups:
        item.reduction = Reduction.merge(torch.cat(groups), targets, anchor_BM=torch.cat(anchors))
    return item
