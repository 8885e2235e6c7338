"""Prompts read in blocks, and the question on a rebuilt cache, against dense references.

Legend: L tokens of the prompt, C context tokens (all up to the last visual one), T text
tokens among them, N visual tokens, G key heads, d head channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from attach_suite import ALL, greedy, logits_of, model_of
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import foveate
from foveate.attach.unrotated import unrotate
from foveate.core import Budget, CacheContext, Card, Method, Reduction
from foveate.core.blocks import Blocks
from foveate.core.flops import prefill_flops
from foveate.errors import RecipeError
from foveate.methods.video_xl2 import VideoXL2, cache_length, number_units
from foveate.models.dims import text_dims
from foveate.models.registry import adapter_for
from foveate.models.rotary import rotate
from foveate.ops.blocks import block_mask
from tiny import Sample, tiny_inputs, tiny_modalities

TOLERANCE = 1e-5
#: One frame is a block and sees one before it; chunks of one frame, pooled by 3.
RECIPE = VideoXL2(block_units=1, previous_blocks=1, chunk_units=1, compression=3, top_k=1)
#: Nothing is hidden and nothing pooled, whatever the budget: () keeps all chunks whole.
NOTHING = VideoXL2(previous_blocks=10**6, chunks=())


def batch(family: str, kind: str = "video") -> dict[str, torch.Tensor]:
    """Padding, two samples of equal layout, two items in one sample, a text-only row."""
    item = f"{kind}:6" if kind == "video" else kind
    samples = (
        Sample(text=(5, 7), items=(item,), seed=0),
        Sample(text=(3, 4, 9), items=(item, "image"), seed=1),
        Sample(text=(5, 7), items=(item,), seed=2),
        Sample(text=(11,), items=(), seed=3),
    )
    return tiny_inputs(family, samples=samples)


def run(model, inputs, method=RECIPE, num=4, **options: Any):
    settings = {"retain": 0.5, **options}
    with foveate.reduce(model, method, **settings) as attachment:
        out = greedy(model, inputs, num)
    return torch.stack(out.logits), out.past_key_values, attachment.report


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ALL)
def test_runs_equal_the_dense_mask(family, attn):
    """The specification: one dense mask for the context, entries masked instead of removed."""
    model = model_of(family, attn=attn)
    inputs = batch(family, tiny_modalities(family)[-1])
    expected, full, _ = run(model, inputs, mask_only=True)
    got, short, report = run(model, inputs)
    torch.testing.assert_close(got, expected, atol=TOLERANCE, rtol=TOLERANCE)
    assert short.layers[0].length < full.layers[0].length
    assert {stage.stage for stage in report.stages} == {"cache"}


@pytest.mark.parametrize("family", ALL)
def test_seeing_all_and_keeping_all_is_the_untouched_model(family):
    model, inputs = model_of(family), batch(family, tiny_modalities(family)[-1])
    plain = greedy(model, inputs)
    got, cache, _ = run(model, inputs, NOTHING)
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(got, torch.stack(plain.logits), atol=TOLERANCE, rtol=TOLERANCE)
    # Keys that were un-rotated and kept are those that were cached rotated.
    for ours, theirs in zip(cache.layers, plain.past_key_values.layers, strict=True):
        valid = torch.ones(ours.kv[0].shape[0], ours.length).bool()
        valid = valid if ours.valid_BT is None else ours.valid_BT
        for sample, real_L in enumerate(real):
            new = theirs.keys.shape[2] - real_L.shape[0]
            index = torch.cat([real_L, torch.ones(new, dtype=torch.bool)])
            for a, b in zip(ours.kv, (theirs.keys, theirs.values), strict=True):
                torch.testing.assert_close(
                    a[sample][:, valid[sample]], b[sample][:, index], atol=TOLERANCE, rtol=TOLERANCE
                )


def test_windows_of_one_keep_the_cache():
    """m = 1: pooling does nothing, though every key is un-rotated and rotated again."""
    model, inputs = model_of("llava_onevision"), batch("llava_onevision")
    got, _, report = run(model, inputs, VideoXL2(compression=1, previous_blocks=99), retain=0.2)
    untouched = torch.stack(greedy(model, inputs).logits)
    torch.testing.assert_close(got, untouched, atol=TOLERANCE, rtol=TOLERANCE)
    assert not report.stages


def two_passes(model, inputs, method: VideoXL2, budget: Budget, positions: str):
    """The published procedure by hand: prefill under a mask, pool, run the question again."""
    adapter = adapter_for(model)
    text, layers = adapter.language_model(model), adapter.layers(model)
    seen: dict[str, Any] = {}
    hook = text.register_forward_pre_hook(lambda m, a, k: seen.update(k), with_kwargs=True)
    logits_of(model, inputs)
    hook.remove()
    embeds, position = seen["inputs_embeds"], seen["position_ids"]
    if position is None:
        position = torch.arange(embeds.shape[1])[None]
    with foveate.reduce(model, method, retain=0.5) as attachment:
        logits_of(model, inputs)
    (item,) = attachment.report.items
    token = adapter.placeholder_ids(model)[item.modality]
    visual_N = (inputs["input_ids"][0] == token).nonzero()[:, 0]
    position_N3 = item.grid.positions()
    item_N = torch.zeros(len(visual_N), dtype=torch.long)
    unit_N = number_units(position_N3, item_N, method.unit_frames)
    C = int(visual_N[-1]) + 1
    block_C = torch.full((C,), -1)
    block_C[visual_N] = unit_N // method.block_units
    low = torch.finfo(torch.float32).min
    mask = torch.zeros(C, C).masked_fill(~block_mask(block_C, method.previous_blocks), low)
    before = DynamicCache()
    part = position[..., :C]
    text(
        inputs_embeds=embeds[:, :C],
        attention_mask=mask[None, None],
        position_ids=part,
        past_key_values=before,
    )
    context = CacheContext(budget, position_N3=position_N3, item_N=item_N)
    reduction = method.cache(before.layers[0].keys[:, :, visual_N], embeds, context)
    cos, sin = text.rotary_emb(embeds, part)
    is_text = torch.ones(C, dtype=torch.bool)
    is_text[visual_N] = False
    text_T = is_text.nonzero()[:, 0]
    place = torch.cat([text_T, visual_N[reduction.anchor_BM[0]]])
    order = place.argsort()

    def mixed(x_1GCd):
        pooled = torch.einsum(
            "mn,bgnd->bgmd", reduction.matrix()[0].to(x_1GCd), x_1GCd[:, :, visual_N]
        )
        return torch.cat([x_1GCd[:, :, text_T], pooled], dim=2)[:, :, order]

    size, rest = len(order), embeds.shape[1] - C
    if positions == "compact":
        entries = torch.arange(size)[None]
        question = torch.arange(size, size + rest)[None]
    else:
        rows = part.double().reshape(-1, 1, C)
        entries = mixed(rows[:, :, :, None])[..., 0].float().reshape(*part.shape[:-1], size)
        question = position[..., C:]
    new_cos, new_sin = text.rotary_emb(embeds, entries)
    after = DynamicCache()
    for index in range(len(layers)):
        keys, values = before.layers[index].keys, before.layers[index].values
        bare = rotate(keys, cos[:, None], -sin[:, None])
        after.update(rotate(mixed(bare), new_cos[:, None], new_sin[:, None]), mixed(values), index)
    causal = torch.ones(rest, size + rest).tril(size).bool()
    hidden = text(
        inputs_embeds=embeds[:, C:],
        attention_mask=torch.zeros(rest, size + rest).masked_fill(~causal, low)[None, None],
        position_ids=question,
        past_key_values=after,
    ).last_hidden_state
    return model.get_output_embeddings()(hidden[:, -1]), after


@pytest.mark.parametrize(
    ("family", "positions"),
    [
        ("llava_onevision", "compact"),
        ("llava_onevision", "original"),
        ("llava_next_video", "compact"),
        ("video_llama_3", "compact"),
        ("qwen2_vl", "original"),
        ("qwen2_5_vl", "original"),
    ],
)
def test_one_pass_equals_the_published_two(family, positions):
    model = model_of(family)
    inputs = tiny_inputs(family, samples=(Sample(text=(5, 7), items=("video:8",), seed=0),))
    method = VideoXL2(block_units=1, previous_blocks=1, chunk_units=1, compression=3, chunks=(1,))
    with torch.no_grad():
        expected, cache = two_passes(model, inputs, method, Budget(retain=0.5), positions)
        with foveate.reduce(model, method, retain=0.5, positions=positions) as attachment:
            out = model(**inputs)
    torch.testing.assert_close(out.logits[:, -1], expected, atol=TOLERANCE, rtol=TOLERANCE)
    for ours, theirs in zip(out.past_key_values.layers, cache.layers, strict=True):
        torch.testing.assert_close(ours.kv[0], theirs.keys, atol=TOLERANCE, rtol=TOLERANCE)
        torch.testing.assert_close(ours.kv[1], theirs.values, atol=TOLERANCE, rtol=TOLERANCE)
    assert attachment.report.cache_lengths[0] == [cache.layers[0].keys.shape[2]] * 4
    untouched = logits_of(model, inputs)[:, -1]
    assert (untouched - expected).abs().max() > 100 * TOLERANCE, "nothing was reduced"


# -- what it costs ------------------------------------------------------------------------------


def video(family: str, frames: int, text: tuple[int, int] = (5, 7)) -> dict[str, torch.Tensor]:
    return tiny_inputs(family, samples=(Sample(text=text, items=(f"video:{frames}",), seed=0),))


def attention_calls(model, inputs, method) -> tuple[list[tuple[int, int]], Any]:
    """(queries, keys) of every call of the attention kernel in the first decoder layer."""
    calls: list[tuple[int, int]] = []
    module = adapter_for(model).text_attentions(model)[0]
    plain = torch.nn.functional.scaled_dot_product_attention
    depth = [0]

    def counted(query, key, *args, **kwargs):
        if query.shape[1] == module.config.num_attention_heads and depth[0]:
            calls.append((query.shape[2], key.shape[2]))
        return plain(query, key, *args, **kwargs)

    def enter(*args):
        depth[0] = 1

    def leave(*args):
        depth[0] = 0

    # Hooks of the layer: the attention module itself is entered several times.
    layer = adapter_for(model).layers(model)[0]
    handles = [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]
    torch.nn.functional.scaled_dot_product_attention = counted
    try:
        with foveate.reduce(model, method, retain=0.5) as attachment:
            logits_of(model, inputs)
    finally:
        torch.nn.functional.scaled_dot_product_attention = plain
        for handle in handles:
            handle.remove()
    return calls, attachment.report


def analytic_pairs(sizes, first, behind, method, left):
    """Queries x keys of one layer: what sees all, every block on what it sees, the question."""
    blocks = [
        sum(sizes[i : i + method.block_units]) for i in range(0, len(sizes), method.block_units)
    ]
    lead = method.previous_blocks + 1
    pairs = (first + sum(blocks[:lead])) ** 2
    for number, size in list(enumerate(blocks))[lead:]:
        near = sum(blocks[max(0, number - method.previous_blocks) : number])
        pairs += size * (first + near + size)
    return pairs + behind * (left + behind)


@pytest.mark.parametrize("frames", [8, 16])
def test_work_done_is_the_work_counted(frames):
    """Kernel calls, cache slots and FLOPs against the formulas."""
    family = "llava_onevision"
    model, inputs = model_of(family), video(family, frames)
    method = VideoXL2(block_units=2, previous_blocks=1, chunk_units=2, compression=3, chunks=(1,))
    calls, report = attention_calls(model, inputs, method)
    (item,) = report.items
    # The newline token at the end of a video belongs to its last frame.
    unit_N = number_units(item.grid.positions(), torch.zeros(item.before).long())
    sizes = torch.bincount(unit_N).tolist()
    assert len(sizes) == frames and sum(sizes) == item.before
    first, behind = 6, 7
    visual = report.stages[0].after[0]
    expected = analytic_pairs(sizes, first, behind, method, first + visual)
    assert report.attention_pairs[0] == [expected] * 4
    assert sum(q * k for q, k in calls) == expected < report.prompt_lengths[0] ** 2
    # No call holds more than the blocks that see each other: this does not grow with L.
    largest = max(sizes) * method.block_units
    assert max(q * k for q, k in calls) <= (first + 2 * largest) ** 2
    # The chunk that was named and those at the ends are whole.
    dense = [unit // 2 in (0, 1, frames // 2 - 1) for unit in range(frames)]
    assert visual == cache_length(sizes, dense, window=3)
    assert report.cache_lengths[0] == [first + visual + behind] * 4


def test_flops_of_the_run_equal_the_report():
    family = "llava_onevision"
    model, inputs = model_of(family, attn="eager"), video(family, 8)

    def counted() -> int:
        with FlopCounterMode(display=False) as counter:
            logits_of(model, inputs, logits_to_keep=1)
        return counter.get_total_flops()

    untouched = counted()
    # Chunks are named: ranking them would be a product more.
    method = VideoXL2(block_units=1, previous_blocks=1, compression=3, chunks=(1,))
    with foveate.reduce(model, method, retain=0.5) as attachment:
        reduced = counted()
    flops, dims = attachment.report.flops, text_dims(model)
    (pairs,) = attachment.report.attention_pairs
    lengths = attachment.report.layer_lengths[0]
    assert flops["reduced"]["prefill"] == prefill_flops(dims, lengths, attention_pairs=pairs)
    saved = flops["untouched"]["prefill"] - flops["reduced"]["prefill"]
    assert saved == dims.attention_pair * (4 * lengths[0] ** 2 - sum(pairs))
    assert untouched - reduced == saved > 0


# -- what it is for -----------------------------------------------------------------------------


def test_retriever_decides_what_is_whole():
    model, inputs = model_of("llava_onevision"), video("llava_onevision", 8)

    def scorer(context, unit_N):
        assert context.x_ND.shape[0] == unit_N.shape[0] and context.text_TD.shape[0] == 7
        return torch.arange(8) == 5

    options = {"chunk_units": 1, "compression": 4, "ends": False, "top_k": 1}
    by_scorer = run(model, inputs, VideoXL2(scorer=scorer, **options))[0]
    options["top_k"] = None
    by_number = run(model, inputs, VideoXL2(chunks=(5,), **options))[0]
    other = run(model, inputs, VideoXL2(chunks=(2,), **options))[0]
    assert torch.equal(by_scorer, by_number) and not torch.equal(by_scorer, other)


def test_projector_methods_come_before():
    model, inputs = model_of("llava_onevision"), batch("llava_onevision")
    recipe = "divprune(retain=0.5) + video_xl2(block_units=1, previous_blocks=1, retain=0.5)"
    logits = []
    for mask_only in (True, False):
        with foveate.reduce(model, recipe, mask_only=mask_only) as attachment:
            logits.append(torch.stack(greedy(model, inputs).logits))
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=TOLERANCE)
    report = attachment.report
    assert report.visual_after < 0.6 * report.visual_before
    assert max(report.cache_lengths[0]) < report.prompt_lengths[0]


@pytest.mark.parametrize("scale", [1.0, 1.3])
def test_unrotate_undoes_partial_and_scaled_rotation(scale):
    key, angle = torch.randn(2, 3, 9, 8), torch.randn(2, 9, 2).repeat(1, 1, 2)
    cos, sin = scale * angle.cos(), scale * angle.sin()
    rotated = rotate(key, cos[:, None], sin[:, None])
    bare = unrotate(rotated, (cos, sin))
    torch.testing.assert_close(bare, key, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rotate(bare, cos[:, None], sin[:, None]), rotated)


def test_gradients_pass():
    model, inputs = model_of("llava_onevision"), video("llava_onevision", 4)
    with foveate.reduce(model, RECIPE, retain=0.5):
        model(**inputs).logits[:, -1].sum().backward()
    weights = [p for n, p in model.named_parameters() if "layers.0.self_attn.k_proj" in n]
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)
    model.zero_grad(set_to_none=True)


# -- refusals -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Uneven(Method):
    """Keeps one entry more in every layer."""

    card = Card("uneven", "uneven", "test", ("cache",), "baseline", ".", positions="compact")

    def prefill(self, context):
        return Blocks(torch.zeros_like(context.item_N), 0)

    def cache(self, keys_BGNd, values_BGNd, context):
        assert keys_BGNd.dtype == torch.float32
        return Reduction.select(torch.arange(2 + context.layer), keys_BGNd.shape[2])


@pytest.mark.parametrize("recipe", ["fastv(retain=0.5) + video_xl2", "aim(retain=0.5) + video_xl2"])
def test_decoder_methods_beside_it_are_refused(recipe):
    with pytest.raises(RecipeError, match="changes what layers see or hold"):
        foveate.reduce(model_of("llava_onevision"), recipe)


def test_other_cache_methods_beside_it_are_refused():
    with pytest.raises(RecipeError, match="quickvideo would reduce what is reduced"):
        foveate.reduce(model_of("llava_onevision"), "video_xl2(retain=0.5) + quickvideo")


def test_layers_of_unequal_length_need_their_positions():
    model, inputs = model_of("llava_onevision"), video("llava_onevision", 4)
    with (
        foveate.reduce(model, Uneven(), retain=0.5),
        pytest.raises(ValueError, match="one number in all layers"),
    ):
        logits_of(model, inputs)
    logits = []
    for mask_only in (True, False):
        got, cache, _ = run(model, inputs, Uneven(), positions="original", mask_only=mask_only)
        logits.append(got)
    torch.testing.assert_close(logits[1], logits[0], atol=TOLERANCE, rtol=TOLERANCE)
    assert len({layer.length for layer in cache.layers}) == 4
