"""What projector-stage methods read of encoder blocks: the numbers of the attention itself.

Legend: I images of an item, H heads, N patches of an image, M tokens of it, R queries.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from attach_suite import batch_of, logits_of, model_of
from encoder_methods import Pairs
from oracle_methods import _card

import foveate
from foveate.core import (
    Budget,
    EncoderAttentionView,
    Method,
    ProjectorContext,
    Recipe,
    Reduction,
    Step,
)
from foveate.errors import AttachmentError, MissingSignalError
from foveate.models.registry import adapter_for
from tiny import FRAMES_AS_IMAGES, PACKED, TINY_FAMILIES, Sample, tiny_inputs, tiny_modalities

#: Queries and keys, not values: the method does not read them.
TAPPED = ("", ".q_proj", ".k_proj")
CLOSE = {"atol": 2e-6, "rtol": 1e-4}
CASES = [
    (family, modality)
    for family in TINY_FAMILIES
    for modality in tiny_modalities(family)
    if modality == "image" or family not in FRAMES_AS_IMAGES
]
every_modality = pytest.mark.parametrize(("family", "modality"), CASES)


@dataclass(frozen=True)
class ReadsBlocks(Method):
    """Notes the views of two blocks and drops the last token of every item."""

    card = _card("reads_blocks", "projector")
    reads_values: ClassVar[bool] = True
    seen: list[tuple[ProjectorContext, tuple[EncoderAttentionView, ...]]] = field(
        default_factory=list, compare=False
    )

    def encoder_layers(self, num_layers, feature_layer):
        return feature_layer, 0

    def projector(self, tokens, context):
        self.seen.append((context, context.encoder_attentions()))
        return Reduction.select(torch.arange(tokens.num_tokens - 1), tokens.num_tokens)


def weights_of(model: Any, tower: Any, inputs: dict) -> dict[int, torch.Tensor]:
    """Attention weights [B, H, M, M] of every block, as the eager kernel gave them."""
    found: dict[int, list[torch.Tensor]] = {}
    handles = []
    for index, attention in enumerate(tower.attentions):

        def note(module, args, output, index=index):
            found.setdefault(index, []).append(output[1])

        handles.append(attention.register_forward_hook(note))
    logits_of(model, inputs)
    for handle in handles:
        handle.remove()
    return {index: torch.cat(parts) for index, parts in found.items()}


def of_two_items(family: str, modality: str) -> dict[str, torch.Tensor]:
    return tiny_inputs(family, samples=(Sample((3, 2, 4), (modality, modality)),))


def read(family: str, modality: str, *more: Method, attn: str = "eager"):
    model, method = model_of(family, attn=attn), ReadsBlocks()
    tower = adapter_for(model).towers(model)[modality]
    inputs = of_two_items(family, modality)
    with foveate.reduce(model, [*more, method], retain=0.5):
        logits_of(model, inputs)
    return model, tower, inputs, method


@pytest.mark.parametrize(("family", "modality"), [c for c in CASES if c[0] not in PACKED])
def test_maps_are_those_of_the_attention_weights(family, modality):
    model, tower, inputs, method = read(family, modality)
    weights = weights_of(model, tower, inputs)
    prefix, image = tower.num_prefix, 0
    for context, views in method.seen:
        assert context.encoder_layers[0] == tower.feature_block
        for layer, view in zip(context.encoder_layers, views, strict=True):
            a_IHMM = weights[layer][image : image + view.num_images]
            mean_IMM = a_IHMM.mean(1)
            patch_INN = mean_IMM[:, prefix:, prefix:]
            torch.testing.assert_close(view.received(), patch_INN.mean(1), **CLOSE)
            every = mean_IMM[..., prefix:].mean(1)
            torch.testing.assert_close(view.received(queries="all"), every, **CLOSE)
            renormalised = a_IHMM[..., prefix:, prefix:]
            renormalised = renormalised / renormalised.sum(-1, keepdim=True)
            among = view.received(keys="patches")
            torch.testing.assert_close(among, renormalised.mean((1, 2)), **CLOSE)
            torch.testing.assert_close(view.given(), patch_INN.mean(2), **CLOSE)
            index_R = torch.tensor([4, 1])
            expected = a_IHMM[:, :, prefix + index_R][..., prefix:]
            torch.testing.assert_close(view.rows(index_R), expected, **CLOSE)
            mask_IN = patch_INN.mean(1) > patch_INN.mean((1, 2))[:, None]
            mask_IN[-1] = False
            chosen = (patch_INN * mask_IN[..., None]).sum(1) / mask_IN.sum(1, True).clamp(min=1)
            torch.testing.assert_close(view.mean_rows(mask_IN), chosen, **CLOSE)
            if tower.has_cls:
                torch.testing.assert_close(view.cls(), mean_IMM[:, 0, prefix:], **CLOSE)
            assert view.values().shape == view.q_IHMd.shape
        image += views[0].num_images
    assert image == weights[0].shape[0]


@pytest.mark.parametrize(("family", "modality"), [c for c in CASES if c[0] in PACKED])
def test_maps_of_packed_encoders_respect_frames_and_windows(family, modality):
    _, tower, _, method = read(family, modality)
    windowed = set()
    for context, views in method.seen:
        for view in views:
            assert view.num_images == len(context.grid.planes) == len(view.planes)
            edges = torch.tensor(view.windows or (0, view.num_patches))
            window_N = torch.bucketize(torch.arange(view.num_patches), edges[1:-1], right=True)
            logits = view.q_IHMd @ view.k_IHMd.mT * tower.head_dim**-0.5
            a_IHNN = logits.masked_fill(window_N[:, None] != window_N, -torch.inf).softmax(-1)
            windowed.add(view.windows is not None)
            torch.testing.assert_close(view.received(), a_IHNN.mean((1, 2)), **CLOSE)
            index_R = torch.tensor([4, 1])
            torch.testing.assert_close(view.rows(index_R), a_IHNN[:, :, index_R], **CLOSE)
            mask_IN = view.received() > view.received().mean(1, keepdim=True)
            chosen = (a_IHNN.mean(1) * mask_IN[..., None]).sum(1) / mask_IN.sum(1, True)
            torch.testing.assert_close(view.mean_rows(mask_IN), chosen, **CLOSE)
            torch.testing.assert_close(view.given(), a_IHNN.mean((1, 3)), **CLOSE)
            with pytest.raises(MissingSignalError, match=r"reads_blocks needs .*no \[CLS\]"):
                view.cls()
    assert windowed == ({True, False} if family == "qwen2_5_vl" else {False})


@dataclass(frozen=True)
class Both(Method):
    """Notes a signal, and the same map made from a view."""

    card = _card("both", "projector")
    needs = ("encoder.received_attention",)

    def encoder_layers(self, num_layers, feature_layer):
        return (feature_layer,)

    def projector(self, tokens, context):
        (view,) = context.encoder_attentions()
        carried_1N = view.to_tokens(view.received(keys="patches"))
        assert view.to_tokens(torch.stack([view.received(keys="patches")] * 2, -1)).shape[-1] == 2
        context.note("carried", carried_1N[0])
        context.note("signal", context.signal("encoder.received_attention"))
        context.note("planes", [(plane, plane) for plane in view.planes], "frames")
        return None


@every_modality
def test_maps_reach_the_tokens_as_signals_do(family, modality):
    model, inputs = model_of(family), of_two_items(family, modality)
    with foveate.reduce(model, Both(), retain=0.5, evidence=True) as run:
        logits_of(model, inputs)
    assert len(run.report.items) >= 2
    for item in run.report.items:
        carried_N, signal_N = (item.evidence[i].value for i in (0, 1))
        assert carried_N.shape == (item.grid.num_tokens,)
        torch.testing.assert_close(carried_N, signal_N, equal_nan=True, **CLOSE)
        assert (~signal_N.isnan()).sum() == item.grid.num_patches
        assert {plane for plane, _ in item.segments} == set(range(len(item.grid.planes)))


@pytest.mark.parametrize("family", ["llava", "llava_onevision"])
def test_maps_follow_an_earlier_projector_method(family):
    model, inputs = model_of(family), of_two_items(family, "image")

    @dataclass(frozen=True)
    class After(Both):
        any_tokens: ClassVar[bool] = True

    at = ("projector",)
    steps = (Step(ReadsBlocks(), at, Budget(0.9)), Step(After(), at, Budget(0.5)))
    with foveate.reduce(model, Recipe(steps), evidence=True) as run:
        logits_of(model, inputs)
    for item in run.report.items:
        carried_N, signal_N = (item.evidence[i].value for i in (0, 1))
        assert len(carried_N) == item.grid.num_tokens
        dropped_N = item.reduction.groups_BN[0] < 0
        assert dropped_N.any() and carried_N[dropped_N].isnan().all()
        torch.testing.assert_close(carried_N, signal_N, equal_nan=True, **CLOSE)


@pytest.mark.parametrize("pairs", [Pairs(), Pairs(proportional=False)], ids=["sizes", "plain"])
def test_maps_of_a_shortened_encoder_belong_to_all_patches(pairs):
    """With sizes they are those of the copies, written out."""
    _, tower, _, method = read("llava", "image", pairs)
    prefix = tower.num_prefix
    for context, views in method.seen:
        last = dict(zip(context.encoder_layers, views, strict=True))[2]
        assert last.q_IHMd.shape[2] < prefix + last.num_patches == 37
        if not pairs.proportional:
            assert last.size_IM is None
            continue
        group_IN = last.reduction.groups_BN
        at = group_IN.clamp(min=0)[:, None, :, None].expand(-1, 3, -1, last.q_IHMd.shape[3])
        alive_IN = group_IN >= 0
        logits = last.q_IHMd.gather(2, at) @ last.k_IHMd.gather(2, at).mT * tower.head_dim**-0.5
        a_IHMM = logits.masked_fill(~alive_IN[:, None, None], -torch.inf).softmax(-1)
        a_IHMM = a_IHMM * alive_IN[:, None, :, None]
        patch_IHNN, alive_IN = a_IHMM[:, :, prefix:, prefix:], alive_IN[:, prefix:]
        total_I1 = alive_IN.sum(1, keepdim=True)
        expected = patch_IHNN.sum(2).mean(1) / total_I1
        torch.testing.assert_close(last.received(), expected, **CLOSE)
        torch.testing.assert_close(last.cls(), a_IHMM[:, :, 0, prefix:].mean(1), **CLOSE)
        torch.testing.assert_close(last.given(), patch_IHNN.mean((1, 3)), **CLOSE)
        index_R = torch.tensor([0, 1, 3, 30])
        torch.testing.assert_close(last.rows(index_R), patch_IHNN[:, :, index_R], **CLOSE)
        mask_IN = torch.zeros_like(alive_IN)
        mask_IN[:, [0, 2, 5]] = alive_IN[:, [0, 2, 5]]
        rows_IN = patch_IHNN.mean(1)[:, [0, 2, 5]].sum(1) / mask_IN.sum(1, keepdim=True)
        torch.testing.assert_close(last.mean_rows(mask_IN), rows_IN, **CLOSE)


@dataclass(frozen=True)
class ReadsBlock(Method):
    """Reads whatever block it is told to, declared or not."""

    card = _card("reads_block", "projector")
    declared: int = 1
    asked: int = 1
    values: bool = False

    def encoder_layers(self, num_layers, feature_layer):
        return (self.declared,)

    def projector(self, tokens, context):
        view = context.encoder_attention(self.asked)
        if self.values:
            view.values()
        return None


def test_what_was_not_declared_is_refused():
    model, inputs = model_of("llava"), of_two_items("llava", "image")
    with foveate.reduce(model, ReadsBlock(), retain=0.5):
        logits_of(model, inputs)
    with (
        pytest.raises(ValueError, match=r"block 2 was not declared.*gave \(1,\)"),
        foveate.reduce(model, ReadsBlock(asked=2), retain=0.5),
    ):
        logits_of(model, inputs)
    with (
        pytest.raises(ValueError, match=r"reads_block did not declare.*reads_values"),
        foveate.reduce(model, ReadsBlock(values=True), retain=0.5),
    ):
        logits_of(model, inputs)
    with pytest.raises(AttachmentError, match="reads encoder block 7; this encoder has 4"):
        foveate.reduce(model, ReadsBlock(declared=7), retain=0.5)
    with pytest.raises(MissingSignalError, match=r"lonely needs the signal encoder\.attention"):
        ProjectorContext(Budget(0.5), method="lonely").encoder_attentions()


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_only_declared_blocks_are_tapped(family):
    """A method that reads one block hooks its attention and projections, and nothing else's."""
    model = model_of(family)
    tower = adapter_for(model).towers(model)["image"]

    def hooks() -> dict[str, int]:
        named = tower.module.named_modules()
        return {name: len(module._forward_hooks) for name, module in named}

    before = hooks()
    with foveate.reduce(model, ReadsBlock(), retain=0.5):
        hooked = {name for name, num in hooks().items() if num > before[name]}
    assert hooks() == before
    taps = ["attn", "attn.qkv"] if tower.packed else [f"self_attn{end}" for end in TAPPED]
    names = {id(module): name for name, module in tower.module.named_modules()}
    assert hooked == {f"{names[id(tower.blocks[1])]}.{tap}" for tap in taps}


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_5_vl"])
def test_queries_and_keys_are_let_go(family):
    """The report outlives the call; what the encoder computed must not."""
    model, inputs = model_of(family), batch_of(family)
    method = ReadsBlock()
    gone = []

    class Watching(ReadsBlock):
        def projector(self, tokens, context):
            gone.append(weakref.ref(context.encoder_attention(1).q_IHMd))
            return None

    with foveate.reduce(model, Watching(), retain=0.5) as run:
        logits_of(model, inputs)
        assert gone and run.report.items and method.declared == 1
        assert all(reference() is None for reference in gone)


def test_values_are_those_of_the_block():
    """Attention times values is what the block's output projection gets."""
    model, tower, inputs, method = read("llava", "image")
    entered = []
    handle = tower.attentions[0].out_proj.register_forward_pre_hook(
        lambda module, args: entered.append(args[0])
    )
    logits_of(model, inputs)
    handle.remove()
    image = 0
    for context, views in method.seen:
        view = dict(zip(context.encoder_layers, views, strict=True))[0]
        a_IHMM = (view.q_IHMd @ view.k_IHMd.mT * tower.head_dim**-0.5).softmax(-1)
        mixed = (a_IHMM @ view.values()).transpose(1, 2).flatten(2)
        expected = entered[0][image : image + view.num_images]
        torch.testing.assert_close(mixed, expected, **CLOSE)
        image += view.num_images


@pytest.mark.parametrize(("family", "modality"), [("internvl", "image"), ("qwen2_vl", "video")])
def test_bfloat16(family, modality):
    model, method = model_of(family, torch.bfloat16), ReadsBlocks()
    inputs = of_two_items(family, modality)
    inputs = {k: v.bfloat16() if v.is_floating_point() else v for k, v in inputs.items()}
    with foveate.reduce(model, method, retain=0.5):
        logits_of(model, inputs)
    for _, views in method.seen:
        for view in views:
            assert view.q_IHMd.dtype == torch.bfloat16
            for values_IN in (view.received(), view.given(), view.to_tokens(view.received())):
                assert values_IN.dtype == torch.float32
                assert bool(values_IN[~values_IN.isnan()].isfinite().all())


@pytest.mark.parametrize("family", ["llava_next", "qwen2_5_vl", "video_llava"])
def test_pictures_are_cut_into_tokens(family):
    modality = tiny_modalities(family)[-1]
    model, inputs = model_of(family), of_two_items(family, modality)
    seen = []

    @dataclass(frozen=True)
    class Looks(Method):
        card = _card("looks", "projector")
        needs = ("encoder.pixels",)

        def projector(self, tokens, context):
            seen.append((context.grid, context.signal("encoder.pixels")))
            return None

    with foveate.reduce(model, Looks(), retain=0.5):
        logits_of(model, inputs)
    for grid, pixels in seen:
        assert pixels.dtype == torch.uint8 and pixels.shape[:2] == (len(grid.planes), 3)
        last = grid.planes[-1]
        assert pixels.shape[2] % last.height == 0 == pixels.shape[3] % last.width


def test_bad_maps_and_masks():
    q = torch.randn(2, 3, 5, 4, generator=torch.Generator().manual_seed(0))
    view = EncoderAttentionView(q, q, num_prefix=1, has_cls=True)
    with pytest.raises(ValueError, match=r"patches, \[2, 4\] .*got \[2, 5\]"):
        view.to_tokens(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"mask bool \[2, 4\], got torch.float32"):
        view.mean_rows(torch.zeros(2, 4))
    with pytest.raises(ValueError, match='queries must be "patches" or "all"'):
        view.received(queries="cls")  # pyright: ignore[reportArgumentType]
    assert view.mean_rows(torch.zeros(2, 4, dtype=torch.bool)).eq(0).all()
