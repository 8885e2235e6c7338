"""Cost figures that papers print for the registered methods, and the same from our formulas.

    python tests/methods/published_figures.py

writes the two tables of docs/flops.md anew. Figures are those of papers, their repositories or
other papers' tables; ours are computed when asked for. Wherever a method says itself how many
tokens stay, it is asked: `count`, `schedule`, `split` and so on.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import ceil, floor
from pathlib import Path

from foveate.core import Budget, Grid, Plane, get_method
from foveate.core.backbone_flops import PoseDims, pose_flops
from foveate.core.flops import (
    EncoderDims,
    TransformerDims,
    encoder_flops,
    prefill_flops,
    published_flops,
)

PAGE = Path(__file__).parents[2] / "docs" / "flops.md"
LLAMA_7B = TransformerDims(32, 4096, 32, 32, 128, 11008, vocab=32000)
LLAMA_13B = TransformerDims(40, 5120, 40, 40, 128, 13824, vocab=32000)
QWEN2_7B = TransformerDims(28, 3584, 28, 4, 128, 18944, vocab=152064)
#: CLIP ViT-L/14 at 336 pixels, all 24 blocks.
CLIP_L = EncoderDims(24, 1024, 16, 64, 4096, 3 * 14 * 14)
#: ViT-B/16 and ViT-L/16.
VIT_B = EncoderDims(12, 768, 12, 64, 3072, 3 * 16 * 16)
VIT_L = EncoderDims(24, 1024, 16, 64, 4096, 3 * 16 * 16)
#: CLIP ViT-B/32 at 224 pixels.
CLIP_B = EncoderDims(12, 768, 12, 64, 3072, 3 * 32 * 32)
#: DeiT-S/16 at 224 pixels.
DEIT_S = EncoderDims(12, 384, 6, 64, 1536, 3 * 16 * 16)
#: MixSTE and MotionBERT on 243 frames of 17 joints.
MIXSTE = PoseDims(8, 512, 1024, 17, head=((512, 3),))
MOTIONBERT = PoseDims(5, 256, 1024, 17, 3, ((256, 512), (512, 3)), streams=2)
TILES = Grid((Plane(24, 24),) * 5)
IMAGE = Grid.image(24, 24)
VIDEO = Grid.video(32, 14, 14)
#: (layers, width, width of the MLP) for the printed formula.
VICUNA_7B, VICUNA_13B, QWEN_7B = (32, 4096, 11008), (40, 5120, 13824), (28, 3584, 18944)


@dataclass(frozen=True)
class Figure:
    """One figure that can be reproduced.

    Attributes:
        method: registry name.
        what: model, input and setting.
        printed: as printed; its digits are the precision asked for unless `within` says otherwise.
        unit: of the figure.
        ours: computes it.
        rule: how it is counted.
        source: whose figure it is, where it is not the method's own paper.
        within: relative tolerance; None: equal when rounded to the printed digits.
    """

    method: str
    what: str
    printed: str
    unit: str
    ours: Callable[[], float]
    rule: str
    source: str = ""
    within: float | None = None

    @property
    def digits(self) -> int:
        """Digits behind the point, as printed."""
        return len(self.printed.partition(".")[2])

    @property
    def value(self) -> float:
        """The printed figure as a number."""
        return float(self.printed.replace(",", ""))

    def holds(self) -> bool:
        """Whether ours is the printed figure."""
        if self.within is None:
            return round(self.ours(), self.digits) == self.value
        return abs(self.ours() / self.value - 1) <= self.within


def tera(flops: float) -> float:
    """In 10^12."""
    return flops / 1e12


def gated(lengths: Sequence[int], layers: tuple[int, int, int] = VICUNA_7B) -> float:
    """TFLOPs as PyramidDrop, TransPrune and LVLM_CSP print them: sum of 4nd2 + 2n2d + 3ndm."""
    _, d, m = layers
    return tera(sum(4 * n * d * d + 2 * n * n * d + 3 * n * d * m for n in lengths))


def printed(model: tuple[int, int, int], tokens: int | Sequence[int]) -> float:
    """TFLOPs by the usual formula of the papers."""
    return tera(published_flops(*model, tokens))


def cut(tokens: int, layers: Sequence[int], shares: Sequence[float], depth: int = 32) -> list[int]:
    """Visual tokens of every layer when shares of `tokens` are left from `layers` on."""
    lengths = [tokens] * depth
    for layer, share in zip(layers, shares, strict=True):
        lengths[layer:] = [int(tokens * share)] * (depth - layer)
    return lengths


def count(name: str, grid: Grid, budget: Budget, **arguments: object) -> float:
    """What the method itself says ahead."""
    return get_method(name)(**arguments).count(grid, budget).tokens


def megabytes(tokens: float, layers: int = 32, width: int = 4096, bits: int = 16) -> float:
    """Keys and values in MiB."""
    return tokens * 2 * layers * width * bits / 8 / 2**20


# -- single systems whose figure takes more than a line --------------------------------------------


def schedule(name: str, tokens: int, retain: float, **arguments: object) -> list[int]:
    """Visual tokens of 32 layers under a method with a schedule of cuts."""
    layers, shares = get_method(name)(**arguments).schedule(retain, 32)
    return cut(tokens, layers, shares)


def fastervlm(tokens: int) -> float:
    """LLaVA-NeXT-7B: the encoder on 5 tiles, and the prefill of the visual tokens alone."""
    return tera(encoder_flops(CLIP_L, 577, 5) + prefill_flops(LLAMA_7B, tokens))


def divprune(model: tuple[int, int, int], untouched: float, visual: int, kept: int) -> float:
    """The paper averages over questions: their mean length follows from the untouched figure."""
    texts = range(200)
    above = next(t for t in texts if printed(model, visual + t) > untouched)
    short, long = (printed(model, visual + above - 1), printed(model, visual + above))
    share = (untouched - short) / (long - short)
    return (1 - share) * printed(model, kept + above - 1) + share * printed(model, kept + above)


def divprune_anyres() -> float:
    """LLaVA-1.6: visual tokens vary; their mean follows from the untouched figure and the text."""
    total = next(n for n in range(5000) if printed(VICUNA_7B, n) >= 11.849)
    text = 45
    return printed(VICUNA_7B, round((total - text) * 0.098) + text)


def aim(visual: bool) -> float:
    """LLaVA-OneVision-7B, 32 frames, 100 tokens of text."""
    if not visual:
        return tera(prefill_flops(QWEN2_7B, 32 * 196 + 100))
    keep = [1.0] * 14 + [max(0.0, 1 - 0.125 * (layer + 1)) for layer in range(14)]
    return tera(prefill_flops(QWEN2_7B, [int(32 * 49 * share) + 100 for share in keep]))


def catp_lengths(shots: int, retain: float) -> list[int]:
    """Demonstrations are cut behind layer 6, the query behind the next."""
    first = floor(576 * (1 + retain) / 2)
    demonstrations, query = floor(retain * 576 * shots), floor(retain * 576)
    return [(shots + 1) * first] * 7 + [demonstrations + first] + [demonstrations + query] * 24


def holitom(model: tuple[int, int, int], frames: int, places: int, retain: float, inner: int = 0):
    """Outer stage alone, or with half the tokens from layer `inner` on."""
    tokens = frames * ceil(places * retain)
    lengths = [tokens] * model[0]
    if inner:
        lengths[inner:] = [tokens // 2] * (model[0] - inner)
    return printed(model, lengths)


def lvlm_csp(last: int) -> float:
    """Percent saved: 12 layers of 64, 4 of 256, 16 of `last` tokens, against 32 of 256."""
    return 100 * (1 - gated([64] * 12 + [256] * 4 + [last] * 16) / gated([256] * 32))


def vflowopt(first: float, second: float, third: float) -> float:
    """Percent of keys and values left by cuts in front of the LLM and at layers 9 and 18 of 28."""
    return 100 * first * (9 + 9 * second + 10 * second * third) / 28


def fastv_saving(text: int) -> float:
    """Percent saved on LLaVA-1.5-13B, half the tokens from layer 2 on."""
    lengths = [576 + text] * 2 + [288 + text] * 38
    return 100 * (1 - printed(VICUNA_13B, lengths) / printed(VICUNA_13B, 576 + text))


def token_transforming(retain: float) -> float:
    """Per cent of DeiT-S's FLOPs that are gone."""
    fewer = get_method("token_transforming")().schedule(196, 12, Budget(retain=retain))
    lengths = [197 - sum(fewer[:layer]) for layer in range(12)]
    mlp = [length - less for length, less in zip(lengths, fewer, strict=True)]
    full = encoder_flops(DEIT_S, [197] * 12)
    return 100 - 100 * encoder_flops(DEIT_S, lengths, mlp_lengths=mlp) / full


def gtp_vit(leaving: int) -> float:
    """Per cent of DeiT-S's FLOPs that are gone when so many patches leave every block."""
    lengths = [197 - leaving * layer for layer in range(12)]
    mlp = [length - leaving for length in lengths]
    full = encoder_flops(DEIT_S, [197] * 12)
    return 100 - 100 * encoder_flops(DEIT_S, lengths, mlp_lengths=mlp) / full


def hot(dims: PoseDims, layer: int, retain: float) -> float:
    """GFLOPs of a pose transformer, as the authors' counter has them: linear layers alone."""
    kept = get_method("hot")().count_frames(243, Budget(retain=retain))
    lengths = [243] * layer + [kept] * (dims.pairs - layer)
    return pose_flops(dims, 243, lengths, recovered=kept < 243, attention=False) / 1e9


def zero_tprune(retain: float) -> float:
    """GFLOPs of DeiT-S, a multiply-add counted once as the paper does."""
    method = get_method("zero_tprune")()
    lengths, left = [], 196
    counts = list(zip(method.blocks(12), method.schedule(196, Budget(retain=retain)), strict=True))
    for layer in range(12):
        lengths.append(left + 1)
        left = min([left, *(pair[1] for block, pair in counts if block == layer)])
    return encoder_flops(DEIT_S, lengths) / 2e9


def stvit(dims: EncoderDims, patches: int = 196, cells: int = 16, **arguments: object) -> int:
    """FLOPs of a ViT with [CLS] whose two blocks behind the first few read the image once more."""
    blocks = get_method("stvit")(**arguments).blocks(dims.num_blocks)
    few, first = cells + 1, blocks[0]
    lengths = [patches + 1] * first + [few] * (dims.num_blocks - first)
    # Keys and values of the image, and what every query reads of it and, once more, of the others.
    image = patches * dims.attention_linear // 2 + dims.attention_pair * few * (few + patches)
    return encoder_flops(dims, lengths, num_patches=patches + 1) + len(blocks) * image


def mask_head(
    dims: EncoderDims, pixels: int, width: int, classes: int, retain: float = 1.0
) -> float:
    """GFLOPs of a ViT that segments with the heads of DToP, a multiply-add counted once.

    Untouched: one head behind the last block. Else one per stage, and the budget's share of the
    patches in the last one.
    """
    import torch

    from foveate.methods.dtop import MaskHead

    with torch.device("meta"):
        head = MaskHead(dims.hidden, classes, width, num_heads=width // 64)
    patches = (pixels // 16) ** 2
    # As published: ViT-L has stages of equal length.
    method = get_method("dtop")(after=(1 / 2 if dims.num_blocks == 12 else 1 / 3, 2 / 3))
    ends = method.blocks(dims.num_blocks)
    left = [round(patches * retain ** (stage / 2)) for stage in range(3)]
    lengths = [left[sum(end < block for end in ends)] for block in range(dims.num_blocks)]
    heads = sum(map(head.flops, left)) if retain < 1 else head.flops(patches)
    return (encoder_flops(dims, lengths, num_patches=patches) + heads) / 2e9


def tempme(fewer_flops: bool) -> float:
    """Tokens of 12 frames of CLIP ViT-B/32 behind the last block; or per cent of FLOPs gone."""
    steps = get_method("tempme")().schedule(12, 49, 12, Budget(retain=0.5, published=True))
    clips, prefix, left = 12, 1, 49
    attention: list[tuple[int, ...]] = []
    mlp: list[int] = []
    for step in steps:
        clips, prefix = clips // step.clips, prefix * step.clips
        left = left * step.clips - step.across
        attention.append((prefix + left,) * clips)
        left -= step.within
        mlp.append((prefix + left) * clips)
    if not fewer_flops:
        return float(mlp[-1])
    reduced = encoder_flops(CLIP_B, attention, mlp_lengths=mlp, num_patches=12 * 50)
    return 100 - 100 * reduced / encoder_flops(CLIP_B, 50, 12)


PRINTED = "printed formula"
GATED = "4nd2 + 2n2d + 3ndm a layer"
OURS = "our rule"
COUNT = "count"
MULTIPLY_ADDS = "our rule, halved"
LINEAR = "linear layers alone, as the authors' counter has it"
HOLITOM_TABLE = "HoliTom's table"


def _figures() -> list[Figure]:
    ov = "LLaVA-OneVision-7B, 32 x 196"
    rows = [
        Figure("aim", f"{ov}, untouched", "99.63", "TFLOPs", lambda: aim(False), OURS, within=0.01),
        Figure(
            "aim",
            f"{ov}, merged and pruned",
            "14.67",
            "TFLOPs",
            lambda: aim(True),
            OURS,
            within=0.01,
        ),
        Figure(
            "catp",
            "LLaVA-NeXT-7B, 3 shots of 576, keys and values untouched",
            "1.12",
            "GiB",
            lambda: megabytes(4 * 576) / 1024,
            COUNT,
            within=0.01,
        ),
        Figure(
            "catp",
            "the same at retain 0.222",
            "0.35",
            "GiB",
            lambda: megabytes(sum(catp_lengths(3, 0.222)) / 32) / 1024,
            COUNT,
        ),
        Figure(
            "divprune",
            "LLaVA-1.5-7B, 576 to 56",
            "0.512",
            "TFLOPs",
            lambda: divprune(VICUNA_7B, 3.228, 576, 56),
            f"{PRINTED}, text from the untouched",
        ),
        Figure(
            "divprune",
            "LLaVA-1.5-13B, 576 to 56",
            "1.002",
            "TFLOPs",
            lambda: divprune(VICUNA_13B, 6.281, 576, 56),
            f"{PRINTED}, text from the untouched",
        ),
        Figure(
            "divprune",
            "LLaVA-1.6-7B, 9.8 %",
            "1.266",
            "TFLOPs",
            divprune_anyres,
            f"{PRINTED}, tokens from the untouched 11.849",
            within=0.005,
        ),
        Figure(
            "divprune",
            "LLaVA-NeXT-Video-7B, 1152 to 115",
            "0.937",
            "TFLOPs",
            lambda: divprune(VICUNA_7B, 6.539, 1152, 115),
            f"{PRINTED}, text from the untouched",
        ),
        Figure(
            "dycoke",
            f"{ov}, 25 %",
            "8.7",
            "TFLOPs",
            lambda: printed(QWEN_7B, 32 * 49),
            PRINTED,
            HOLITOM_TABLE,
        ),
        Figure(
            "dycoke",
            f"{ov}, K 0.7, tokens left",
            "47.5",
            "%",
            lambda: 100 * count("dycoke", VIDEO, Budget(retain=0.475)) / 6272,
            f"{COUNT}; 1/4 + 3/4 x 0.3",
            "from its rule",
            within=0.01,
        ),
        Figure(
            "fastervlm",
            "LLaVA-NeXT-7B, 2880",
            "43.58",
            "TFLOPs",
            lambda: fastervlm(2880),
            f"{OURS}, encoder and visual tokens",
            within=0.001,
        ),
        *(
            Figure(
                "fastervlm",
                f"LLaVA-NeXT-7B, {n}",
                said,
                "TFLOPs",
                lambda n=n: fastervlm(n),
                f"{OURS}, encoder and visual tokens",
            )
            for n, said in ((720, "11.51"), (290, "5.71"), (145, "3.80"))
        ),
        *(
            Figure(
                "fastervlm",
                f"LLaVA-NeXT-7B, {n}, keys and values",
                said,
                "MiB",
                lambda n=n: megabytes(count("fastervlm", TILES, Budget(tokens=n))),
                COUNT,
            )
            for n, said in ((2880, "1440"), (720, "360"), (290, "145"), (145, "72.5"))
        ),
        Figure(
            "fastv",
            "LLaVA-1.5-13B, layer 2, retain 0.5, FLOPs saved",
            "45",
            "%",
            lambda: fastv_saving(45),
            f"{PRINTED}, 45 tokens of text",
        ),
        Figure(
            "fastv",
            f"{ov}, layer 2, retain 0.2",
            "9.3",
            "TFLOPs",
            lambda: printed(QWEN_7B, [6272] * 2 + [round(0.2 * 6272)] * 26),
            PRINTED,
            HOLITOM_TABLE,
        ),
        Figure(
            "fopru",
            "LLaVA-1.5, a quarter of 576",
            "144",
            "tokens",
            lambda: count("fopru", IMAGE, Budget(retain=0.25)),
            COUNT,
            "from its rule",
        ),
        Figure(
            "hiprune",
            "LLaVA-1.5-7B, 192 of 576, FLOPs saved",
            "58.7",
            "%",
            lambda: 100 * (1 - prefill_flops(LLAMA_7B, 272) / prefill_flops(LLAMA_7B, 656)),
            f"{OURS}, 80 tokens of text",
            "a secondary note",
            within=0.01,
        ),
        Figure(
            "hiprune",
            "LLaVA-1.5-7B, 64 of 576, FLOPs down by up to",
            "9",
            "times",
            lambda: prefill_flops(LLAMA_7B, 576) / prefill_flops(LLAMA_7B, 64),
            f"{OURS}, without text",
        ),
        *(
            Figure(
                "hiprune",
                f"LLaVA-NeXT, 5 tiles, {n}",
                str(n),
                "tokens",
                lambda n=n: count("hiprune", TILES, Budget(tokens=n)),
                COUNT,
            )
            for n in (640, 320, 160)
        ),
        Figure(
            "holitom", f"{ov}, untouched", "40.8", "TFLOPs", lambda: printed(QWEN_7B, 6272), PRINTED
        ),
        *(
            Figure(
                "holitom",
                f"{ov}, {share:.0%}{', with inner merging' if inner else ''}",
                said,
                "TFLOPs",
                lambda share=share, inner=inner: holitom(QWEN_7B, 32, 196, share, inner),
                PRINTED,
            )
            for share, outer, both in (
                (0.25, "8.7", "7.1"),
                (0.2, "7.0", "5.8"),
                (0.15, "5.2", "4.3"),
                (0.1, "3.4", "2.8"),
            )
            for inner, said in ((0, outer), (18, both))
        ),
        Figure(
            "holitom",
            "LLaVA-OneVision-72B, 32 x 196, untouched",
            "429.3",
            "TFLOPs",
            lambda: printed((80, 8192, 29568), 6272),
            PRINTED,
        ),
        Figure(
            "holitom",
            "LLaVA-Video-7B, 64 x 169, untouched",
            "80.2",
            "TFLOPs",
            lambda: printed(QWEN_7B, 64 * 169),
            PRINTED,
        ),
        Figure(
            "holitom",
            "LLaVA-OneVision-72B, 15 %, with inner merging",
            "51.6",
            "TFLOPs",
            lambda: holitom((80, 8192, 29568), 32, 196, 0.15, 60),
            PRINTED,
        ),
        Figure(
            "holitom",
            "LLaVA-Video-7B, 64 x 169, 15 %",
            "9.3",
            "TFLOPs",
            lambda: holitom(QWEN_7B, 64, 169, 0.15),
            PRINTED,
        ),
        Figure(
            "holitom",
            "LLaVA-Video-7B, 15 %, with inner merging",
            "7.6",
            "TFLOPs",
            lambda: holitom(QWEN_7B, 64, 169, 0.15, 18),
            PRINTED,
        ),
        *(
            Figure(
                "intp",
                f"Video-LLaVA-7B, {frames} frames, keys and values, {bits} bits",
                said,
                "GB",
                lambda frames=frames, bits=bits: megabytes(256 * frames, bits=bits) * 2**20 / 1e9,
                COUNT,
            )
            for frames, bits, said in (
                (32, 16, "4.3"),
                (64, 16, "8.6"),
                (32, 2, "0.5"),
                (64, 2, "1.1"),
            )
        ),
        Figure(
            "lvlm_csp",
            "32 layers, 256 tokens, ranges of 64, 256 and 64, FLOPs saved",
            "65",
            "%",
            lambda: lvlm_csp(64),
            f"{GATED}; ranges are ours",
            within=0.015,
        ),
        Figure(
            "lvlm_csp",
            "the same with 48 tokens at the end",
            "70",
            "%",
            lambda: lvlm_csp(48),
            f"{GATED}; ranges are ours",
            within=0.02,
        ),
        *(
            Figure(
                "m3",
                f"5 image grids of {n // 5} tokens",
                str(n),
                "tokens",
                lambda n=n: count("m3", Grid.video(5, 24, 24), Budget(tokens=n), strict=True),
                COUNT,
            )
            for n in (720, 180, 45, 5)
        ),
        Figure(
            "m3",
            "visual lengths of a training step, all scales",
            "766",
            "tokens",
            lambda: sum(get_method("m3")().scales(24, 24)),
            COUNT,
        ),
        Figure(
            "pyramiddrop",
            "LLaVA-1.5-7B, untouched",
            "3.82",
            "TFLOPs",
            lambda: gated([576] * 32),
            GATED,
        ),
        Figure(
            "pyramiddrop",
            "LLaVA-1.5-7B, 4 stages",
            "1.78",
            "TFLOPs",
            lambda: gated(schedule("pyramiddrop", 576, 0.46875)),
            GATED,
        ),
        Figure(
            "pyramiddrop",
            "LLaVA-1.5-7B, 3 stages",
            "2.13",
            "TFLOPs",
            lambda: gated(cut(576, (10, 20), (0.5, 0.25))),
            f"{GATED}; stages of 10, 10, 12 layers (our default rounds to 11, 10, 11: 2.22)",
        ),
        Figure(
            "pyramiddrop",
            "LLaVA-1.5-7B, 5 stages",
            "1.38",
            "TFLOPs",
            lambda: gated(cut(576, (6, 12, 18, 24), (0.5, 0.25, 0.125, 0.0625))),
            f"{GATED}; stages of 6 layers, the last of 8 (our default rounds up: 1.45)",
            within=0.01,
        ),
        Figure(
            "pyramiddrop",
            "LLaVA-NeXT-7B, 2880, FLOPs saved",
            "55",
            "%",
            lambda: 100 * (1 - gated(schedule("pyramiddrop", 2880, 0.46875)) / gated([2880] * 32)),
            GATED,
        ),
        Figure(
            "quickvideo",
            "921,600 tokens: groups of 16 frames of 256 tokens",
            "225",
            "groups",
            lambda: 921_600 / (16 * 256),
            COUNT,
        ),
        Figure(
            "recoverable",
            "LLaVA-1.5-7B, untouched",
            "8.5",
            "TFLOPs",
            lambda: tera(prefill_flops(LLAMA_7B, 576 + 60)),
            f"{OURS}, 60 tokens of text",
            within=0.01,
        ),
        Figure(
            "recoverable",
            "LLaVA-1.5-7B, about 10 %",
            "1.5",
            "TFLOPs",
            lambda: tera(prefill_flops(LLAMA_7B, 58 + 60)),
            f"{OURS}, 60 tokens of text",
        ),
        Figure(
            "todre",
            "LLaVA-NeXT, 25 % of 2880",
            "720",
            "tokens",
            lambda: count("todre", TILES, Budget(retain=0.25)),
            COUNT,
        ),
        Figure(
            "todre",
            "LLaVA-NeXT, 10 % of 2880",
            "288",
            "tokens",
            lambda: count("todre", TILES, Budget(retain=0.1)),
            COUNT,
        ),
        Figure(
            "transprune",
            "LLaVA-1.5-7B, High",
            "1.56",
            "TFLOPs",
            lambda: gated(schedule("transprune", 576, 0.41015625)),
            GATED,
        ),
        Figure(
            "transprune",
            "LLaVA-1.5-7B, Low",
            "1.19",
            "TFLOPs",
            lambda: gated(schedule("transprune", 576, 0.3125)),
            GATED,
        ),
        Figure(
            "transprune",
            "LLaVA-NeXT-7B, 2880, High, FLOPs left",
            "40.0",
            "%",
            lambda: 100 * gated(schedule("transprune", 2880, 0.41015625)) / gated([2880] * 32),
            GATED,
        ),
        Figure(
            "transprune",
            "LLaVA-NeXT-7B, 2880, Low, FLOPs left",
            "30.8",
            "%",
            lambda: 100 * gated(schedule("transprune", 2880, 0.3125)) / gated([2880] * 32),
            f"{GATED}; the Low shares are inferred",
            within=0.012,
        ),
        Figure(
            "transprune",
            "LLaVA-1.5-7B, VisionZip to 288, 36 at the end, FLOPs left",
            "17.3",
            "%",
            lambda: 100 * gated(cut(288, (7, 9, 12), (0.5, 0.25, 0.125))) / gated([576] * 32),
            GATED,
        ),
        Figure(
            "ts_llava",
            "50 frames of 576, sampled tokens",
            "2880",
            "tokens",
            lambda: count("ts_llava", Grid.video(50, 24, 24), Budget(retain=0.1)),
            COUNT,
        ),
        Figure(
            "ts_llava",
            "the same with the thumbnail",
            "3456",
            "tokens",
            lambda: count("ts_llava", Grid.video(50, 24, 24), Budget(retain=0.1)) + 576,
            COUNT,
        ),
        *(
            Figure(
                "vflowopt",
                f"LLaVA-OneVision-7B, {share} %: r_v, r_1, r_2 as released",
                share,
                "%",
                lambda knobs=knobs: vflowopt(*knobs),
                COUNT,
            )
            for share, knobs in (
                ("50", (0.72332, 0.74875, 0.487)),
                ("25", (0.2651, 0.98334, 0.87733)),
                ("10", (0.11662, 1.0, 0.6011)),
            )
        ),
        *(
            Figure(
                "vidcom2",
                f"{shape}, {share:.0%}",
                said,
                "tokens",
                lambda grid=grid, share=share: count("vidcom2", grid, Budget(retain=share)),
                COUNT,
                "from its setting",
            )
            for shape, grid, share, said in (
                (ov, VIDEO, 0.25, "1568"),
                (ov, VIDEO, 0.15, "941"),
                ("LLaVA-Video-7B, 64 x 169", Grid.video(64, 13, 13), 0.25, "2704"),
            )
        ),
        *(
            Figure(
                "visionzip",
                f"LLaVA-1.5-7B, {n} of 576",
                f"{n}",
                "tokens",
                lambda n=n: sum(get_method("visionzip")().split(n)),
                COUNT,
            )
            for n in (64, 128, 192)
        ),
        *(
            Figure(
                "visionzip",
                f"LLaVA-NeXT-7B, {n} of 2880",
                f"{n}",
                "tokens",
                lambda n=n: count("visionzip", TILES, Budget(tokens=n)),
                COUNT,
            )
            for n in (160, 320, 640)
        ),
        Figure(
            "gtp_vit",
            "DeiT-S, 8 patches a block, fewer FLOPs",
            "26",
            "%",
            lambda: gtp_vit(8),
            OURS,
        ),
        Figure("hot", "MixSTE, untouched", "277", "GFLOPs", lambda: hot(MIXSTE, 3, 1.0), LINEAR),
        Figure(
            "hot",
            "MixSTE, 81 of 243 frames from pair 3 (-39.6 %)",
            "167",
            "GFLOPs",
            lambda: hot(MIXSTE, 3, 1 / 3),
            LINEAR,
            within=0.01,
        ),
        Figure(
            "hot",
            "MotionBERT, untouched",
            "131",
            "GFLOPs",
            lambda: hot(MOTIONBERT, 1, 1.0),
            LINEAR,
        ),
        Figure(
            "hot",
            "MotionBERT, 81 of 243 frames from block 1 (-51.8 %)",
            "63",
            "GFLOPs",
            lambda: hot(MOTIONBERT, 1, 1 / 3),
            LINEAR,
        ),
        Figure(
            "tempme",
            "CLIP ViT-B/32, tokens left of 12 frames of 50",
            "97",
            "tokens",
            lambda: tempme(False),
            COUNT,
            "its released code",
        ),
        Figure(
            "token_transforming",
            "DeiT-S at its retain (ours), fewer FLOPs",
            "40",
            "%",
            lambda: token_transforming(48 / 196),
            OURS,
            within=0.01,
        ),
        *(
            Figure(
                "dtop",
                f"{what}, untouched, one head",
                printed_value,
                "GFLOPs",
                lambda dims=dims, setting=setting: mask_head(dims, *setting),
                MULTIPLY_ADDS,
                within=0.01,
            )
            for what, printed_value, dims, setting in (
                ("ADE20K, ViT-B at 512", "109.9", VIT_B, (512, 384, 150)),
                ("ADE20K, ViT-L at 640", "617.0", VIT_L, (640, 512, 150)),
                ("Pascal Context, ViT-L at 480", "315.4", VIT_L, (480, 512, 60)),
                ("COCO-Stuff10k, ViT-L at 512", "366.9", VIT_L, (512, 512, 171)),
            )
        ),
        Figure(
            "zero_tprune",
            "DeiT-S, untouched",
            "4.55",
            "GFLOPs",
            lambda: zero_tprune(1.0),
            MULTIPLY_ADDS,
            within=0.015,
        ),
        Figure(
            "zero_tprune",
            "DeiT-S, 34.7 % fewer, at retain 0.275",
            "2.97",
            "GFLOPs",
            lambda: zero_tprune(0.275),
            MULTIPLY_ADDS,
            within=0.01,
        ),
    ]
    return rows


FIGURES = _figures()

#: method, figure, why it cannot be had from a formula. The method's name alone: none is known.
NOT_REPRODUCED: list[tuple[str, str, str]] = [
    (
        "b_vllm",
        "at most 512 tokens, about 10 % more on MVBench",
        "32 tokens of each of 16 rows by a trained Q-Former, which is not here; that the budget is "
        "met exactly is in its tests",
    ),
    (
        "catp",
        "LLaVA-NeXT-7B at retain 0.222: 79.0 % fewer FLOPs",
        "its own schedule saves 70.7 %: 61 % of the tokens are left until layers 6 and 7 have run. "
        "Its keys and values confirm that; 22.2 % of the tokens in every layer would save 79.3 %",
    ),
    (
        "centerclip",
        "CLIP ViT-B/32, 35 % less memory, 14 % faster",
        "memory and times of fine-tuning, not FLOPs",
    ),
    (
        "dtop",
        "86.8, 412.8, 224.3 and 276.2 GFLOPs with pruning, 20 to 35 % fewer",
        "how many patches leave is for trained heads to say, image by image, and no counts are "
        "printed. With half of the patches left at the end ours are 88.1, 444.3, 230.4 and 270.2, "
        "three heads included; that the report counts the patches of every image is in its tests",
    ),
    ("dycoke", "1.5 times faster, 1.4 times less memory", "times and memory, not FLOPs"),
    (
        "evs",
        "up to 4 times less time to first token",
        "a time; no FLOPs are printed (not verified beyond the abstract)",
    ),
    (
        "f2c",
        "up to +8.1, +5.6 and +10.3 % on three benchmarks",
        "accuracy at equal cost; that clips cost no more than key frames is in its tests",
    ),
    ("flowcut", "3.2 times faster prefill", "a time; no FLOPs on its pages"),
    ("fopru", "0.2 % of the tokens", "the model is not said; of 576 tokens it is one"),
    ("free_video_llm", "2648 tokens of 50 frames", "a count by its own rule; its tests check it"),
    (
        "grt",
        "tokens and time grow more slowly than the frame rate",
        "no figure of cost is given in its abstract; that doubling the rate of a slow clip adds "
        "less than twice the tokens is in its tests",
    ),
    (
        "pyramiddrop",
        "LLaVA-OneVision-7B, 10.5 TFLOPs (HoliTom's table)",
        "the table does not say at which layers and shares",
    ),
    (
        "kffocus",
        "fewer tokens at better accuracy",
        "no figure is given in the abstract, and the module that was measured is trained",
    ),
    (
        "qtsplus",
        "89 % fewer tokens, 28 % less latency",
        "how many stay is for its trained head to say; that it stays within its bounds is in its "
        "tests",
    ),
    (
        "quickvideo",
        "921,600 tokens: 393.9 GB of keys and values",
        "InternVL2.5-8B has 8 key heads of 128 in 32 layers: 112.5 GiB; 28 layers of 4096 without "
        "shared heads would give 393.8 GiB. The shape behind the figure is not said.",
    ),
    (
        "quota",
        "+3.2 % over six benchmarks at 12,544 tokens",
        "accuracy at equal cost; the counts of frames and tokens are in its tests",
    ),
    (
        "safewatch",
        "98,245 GFLOPs untouched, 97,430 with its two parts",
        "neither the number of frames nor the lengths of policies are given",
    ),
    (
        "stvit",
        "nearly 60 % fewer FLOPs of DeiT with 16 tokens",
        "no figure to compute: where its two blocks stand is not published, and with ours DeiT-S "
        "saves 57.9 %. The 30 % of STViT-R are of detectors on Swin; its groups save 35 % of "
        "Swin-S at 224 pixels",
    ),
    (
        "tdc",
        "about 32 tokens for a frame of 144",
        "a count, (144 + 7 x 16) / 8; its tests check it, and no cost is printed beside it",
    ),
    (
        "tempme",
        "95 % fewer tokens, 51 % fewer GFLOPs",
        "compares with earlier methods for retrieval, whose counts the abstract does not give, not "
        "with the untouched encoder: of CLIP ViT-B/32 its released settings leave 97 of 600 tokens "
        "(84 % fewer) and save 34.4 % of the FLOPs by our rule (34.7 GFLOPs as multiply-adds)",
    ),
    (
        "todre",
        "LLaVA-NeXT-7B at 10 %: 6.0 of 31.4 TFLOPs",
        "measured with real any-resolution images, whose number of tokens is not given; by our "
        "rule 2880 tokens alone would be 41.7",
    ),
    ("tome", "images per second", "times; the FLOPs in its paper were not at hand (not verified)"),
    (
        "transprune",
        "Qwen2.5-VL-7B at 45.1 %",
        "neither the schedule nor the number of tokens is given for that model",
    ),
    (
        "vflowopt",
        "3.8 times faster, keys and values 89 % less",
        "a time, and 90 % rounded otherwise: the shares above leave 10.0 %",
    ),
    (
        "vidcom2",
        "70.8 % less time of generation",
        "a time; no FLOPs are printed in its abstract (tables not verified)",
    ),
    (
        "video_streaming",
        "MovieNet-QA: 256 tokens, 5.32 s",
        "a time, of an encoder that is not part of this; the count is in its tests",
    ),
    (
        "video_xl2",
        "share of attention that block-wise reading computes",
        "counted in its code, not printed for a benchmark",
    ),
    (
        "videoscan",
        "VStream-QA: 2.1 s and 18 GB, whatever the length",
        "a time and memory; the lengths of its caches are in its tests",
    ),
    (
        "s5",
        "up to 9.6 % more accuracy than ViS4mer with 23 % less memory",
        "accuracy and memory of trained models; no FLOPs are printed",
    ),
    (
        "tovim",
        "PlainMamba-L3: 41.6 % fewer FLOPs",
        "neither the blocks nor the shares of that model are published (its release has Vim "
        "alone). On Vim-S the released 0.8 behind blocks 5, 10 and 15 saves 29.0 % by our rule, "
        "0.7 there 40.4 %",
    ),
    (
        "zero_tprune",
        "DeiT-S at 3.08 GFLOPs",
        "its schedule was not at hand in the paper's words; the one we have costs 3.15",
    ),
    ("visionzip", "prefill 8 times faster", "a time; FLOPs were not verified"),
    (
        "vista_llama",
        "128 tokens of 8 frames",
        "its projector, which is trained, is not here; the attention rule changes no count",
    ),
]


def tables() -> str:
    """The two tables as Markdown."""
    lines = ["| method | what | printed | ours | counted by |", "|---|---|---:|---:|---|"]
    for row in FIGURES:
        source = f" ({row.source})" if row.source else ""
        exact = "" if row.within is None else f"; within {100 * row.within:g} %"
        ours = f"{row.ours():.{max(row.digits, 0)}f}"
        if row.within is not None:
            ours = f"{row.ours():.{row.digits + 1}f}"
        lines.append(
            f"| `{row.method}` | {row.what}{source} | {row.printed} {row.unit} | {ours} | "
            f"{row.rule}{exact} |"
        )
    lines += ["", "Not reproduced, and why:", ""]
    lines += ["| method | printed | why not |", "|---|---|---|"]
    lines += [f"| `{name}` | {what} | {why} |" for name, what, why in NOT_REPRODUCED]
    return "\n".join(lines)


MARKS = ("<!-- published figures: begin -->", "<!-- published figures: end -->")


def block(page: str) -> str:
    """What stands between the marks of the page."""
    found = re.search(rf"{re.escape(MARKS[0])}\n(.*?)\n{re.escape(MARKS[1])}", page, re.DOTALL)
    if found is None:
        raise ValueError(f"{PAGE.name} has no marks {MARKS}.")
    return found[1]


def main() -> None:
    page = PAGE.read_text("utf-8")
    before, _, rest = page.partition(MARKS[0])
    block(page)  # refuses a page without marks
    behind = rest.partition(MARKS[1])[2]
    PAGE.write_text(f"{before}{MARKS[0]}\n{tables()}\n{MARKS[1]}{behind}", "utf-8")
    print(f"{len(FIGURES)} figures, {len(NOT_REPRODUCED)} not reproduced", file=sys.stderr)


if __name__ == "__main__":
    main()
