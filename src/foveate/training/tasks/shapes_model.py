"""The networks of the task `shapes`, and how they are run while they train.

`foveate.reduce` keeps no gradients, so the semantic network is run here by its own layers; a test
holds it against `foveate.reduce`.

Legend: B pictures, N tokens, P patches, T semantic tokens, M queries, C channels, h and w rows and
columns of patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import ViTConfig, ViTModel

from foveate import ops
from foveate.methods.dtop import MaskHead
from foveate.methods.stvit import CrossBlock
from foveate.training.tasks.shapes_data import NUM_CLASSES, NUM_LABELS, PATCH, SIDE, TEXTURES

#: Rows and columns of patches, and of semantic tokens.
PLANE, CELLS = (SIDE // PATCH, SIDE // PATCH), (4, 4)
#: Blocks behind which dtop's earlier heads stand, and blocks on image tokens of stvit.
EARLY, IMAGE_BLOCKS = (2, 4), 3


class Centres(nn.Module):
    """What is added to the semantic tokens before they read the picture a second time."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.global_tokens = nn.Parameter(torch.zeros(1, CELLS[0] * CELLS[1], width))


def build_networks(width: int, layers: int, heads: int, mlp: int) -> dict[str, nn.Module]:
    """All modules of the task by name; torch's global generator draws the weights."""
    config = ViTConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=mlp,
        image_size=SIDE,
        patch_size=PATCH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.08,
    )
    trunk, semantic = (ViTModel(config, add_pooling_layer=False) for _ in range(2))
    nn.init.xavier_uniform_(trunk.embeddings.patch_embeddings.projection.weight.view(width, -1))
    with torch.no_grad():
        trunk.embeddings.position_embeddings[0, 1:] = waves(width)
    return {
        "trunk": trunk,
        "classify": nn.Linear(width, NUM_LABELS),
        "segment": nn.Linear(width, NUM_CLASSES),
        "early": nn.ModuleList(nn.Linear(width, NUM_CLASSES) for _ in EARLY),
        "masks": _mask_heads(width),
        "semantic": semantic,
        "semantic_classify": nn.Linear(width, NUM_LABELS),
        "semantic_segment": nn.Linear(width, NUM_CLASSES),
        "centres": Centres(width),
        "recover": CrossBlock(width, heads, 2 * width, scale=0.1),
        "mosaic": ViTModel(config, add_pooling_layer=False),
        "mosaic_classify": nn.Linear(width, len(TEXTURES)),
        "mosaic_segment": nn.Linear(width, NUM_CLASSES),
        "exits": ViTModel(config, add_pooling_layer=False),
        "exits_masks": _mask_heads(width),
        "dense": ViTModel(config, add_pooling_layer=False),
        "dense_masks": _mask_heads(width),
    }


def _mask_heads(width: int) -> nn.ModuleList:
    return nn.ModuleList(
        MaskHead(width, NUM_CLASSES, width // 2, 2, num_layers=2, dropout=0.0)
        for _ in range(len(EARLY) + 1)
    )


def waves(width: int) -> Tensor:
    """Positions to begin with: sines and cosines of rows and columns, [P, C].

    Source: Masked Autoencoders (arXiv 2111.06377), appendix A.
    """
    speed = 100 ** -torch.linspace(0, 1, width // 4)
    angle_hX = torch.arange(PLANE[0])[:, None] * speed
    wave_hX = torch.cat([angle_hX.sin(), angle_hX.cos()], dim=1)
    row_hwX, column_hwX = torch.broadcast_tensors(wave_hX[:, None], wave_hX[None])
    return 0.5 * torch.cat([row_hwX, column_hwX], dim=2).flatten(0, 1)


def embed(vit: Any, pixels_B3SS: Tensor, corner_B2: Tensor) -> Tensor:
    """[CLS] and patches with their positions, [B, 1 + P, C].

    Args:
        vit: a `ViTModel`.
        pixels_B3SS: pictures or parts of them.
        corner_B2: row and column of the first patch in the whole picture.
    """
    patch_BPC = vit.embeddings.patch_embeddings.projection(pixels_B3SS)
    side = patch_BPC.shape[2]
    patch_BPC = patch_BPC.flatten(2).transpose(1, 2)
    place_Bs2 = corner_B2[:, None] + torch.arange(side, device=corner_B2.device)[None, :, None]
    index_BP = (place_Bs2[:, :, None, 0] * PLANE[1] + place_Bs2[:, None, :, 1]).flatten(1)
    position_NC = vit.embeddings.position_embeddings[0]
    cls_B1C = (vit.embeddings.cls_token[0] + position_NC[:1]).expand(len(patch_BPC), 1, -1)
    return torch.cat([cls_B1C, patch_BPC + position_NC[1:][index_BP]], dim=1)


def depths(vit: Any, pixels_B3SS: Tensor, corner_B2: Tensor) -> list[Tensor]:
    """What leaves the blocks of `EARLY` and, normed, the last one, each [B, 1 + P, C]."""
    x_BNC, found = embed(vit, pixels_B3SS, corner_B2), []
    for number, layer in enumerate(vit.layers, 1):
        x_BNC = layer(x_BNC)
        if number in EARLY:
            found.append(x_BNC)
    return [*found, x_BNC, vit.layernorm(x_BNC)]


def read(layer: Any, x_BMC: Tensor, keys_BLC: Tensor, shown_BL: Tensor | None = None) -> Tensor:
    """A ViT block whose tokens read others, [B, M, C]; of those only the shown ones, if given."""
    norm, attention = layer.layernorm_before, layer.attention
    split = (attention.config.num_attention_heads, -1)
    q_BHMd = attention.q_proj(norm(x_BMC)).unflatten(2, split).transpose(1, 2)
    y_BLC = norm(keys_BLC)
    k_BHLd, v_BHLd = (
        projection(y_BLC).unflatten(2, split).transpose(1, 2)
        for projection in (attention.k_proj, attention.v_proj)
    )
    mask = None if shown_BL is None else shown_BL[:, None, None]
    out_BHMd = scaled_dot_product_attention(q_BHMd, k_BHLd, v_BHLd, attn_mask=mask)
    x_BMC = x_BMC + attention.o_proj(out_BHMd.transpose(1, 2).flatten(2))
    return x_BMC + layer.mlp(layer.layernorm_after(x_BMC))


def exit_run(
    vit: Any, heads: Sequence[nn.Module], pixels_B3SS: Tensor, tau: float, keep_per_class: int = 5
) -> list[tuple[Tensor, Tensor]]:
    """DToP with patches leaving: behind every stage the canvas [B, K, P] and classes [B, K, 2].

    Patches that have left are kept out of the attention, not out of the sequence.

    Args:
        vit: a `ViTModel`.
        heads: one per stage.
        pixels_B3SS: pictures.
        tau: score above which a patch is final; 1: none leaves.
        keep_per_class: certain patches of every class that stay all the same.

    Source: DToP (arXiv 2308.01045), as `foveate.methods.dtop` attaches it.
    """
    x_BNC = embed(vit, pixels_B3SS, pixels_B3SS.new_zeros(len(pixels_B3SS), 2).long())
    active_BN = torch.ones_like(x_BNC[..., 0], dtype=torch.bool)
    found: list[tuple[Tensor, Tensor]] = []
    for number, layer in enumerate(vit.layers, 1):
        x_BNC = read(layer, x_BNC, x_BNC, active_BN)
        if number not in (*EARLY, len(vit.layers)):
            continue
        active_BP = active_BN[:, 1:]
        canvas_BKP, class_BK2 = heads[len(found)](x_BNC[:, 1:].float(), active_BP)
        if found:
            canvas_BKP = canvas_BKP.where(active_BP[:, None], found[-1][0])
        found.append((canvas_BKP, class_BK2))
        with torch.no_grad():
            score_BKP = ops.presence_scores(canvas_BKP.float(), class_BK2.float())
            sure_BP = ops.sure_tokens(score_BKP, tau, keep_per_class, active_BP)
        active_BN = torch.cat([active_BN[:, :1], active_BP & ~sure_BP], dim=1)
    return found


def semantic_run(modules: dict[str, nn.Module], pixels_B3SS: Tensor) -> tuple[Tensor, Tensor]:
    """STViT with the network's own blocks: [CLS], [B, C], and recovered patches, [B, P, C]; normed.

    Source: STViT (arXiv 2303.08685), as `foveate.methods.stvit` attaches it.
    """
    vit: Any = modules["semantic"]
    x_BNC = embed(vit, pixels_B3SS, pixels_B3SS.new_zeros(len(pixels_B3SS), 2).long())
    for layer in vit.layers[:IMAGE_BLOCKS]:
        x_BNC = layer(x_BNC)
    first, second, *rest = vit.layers[IMAGE_BLOCKS:]
    image_BPC = x_BNC[:, 1:]
    pooled_BTC = ops.pool_windows(image_BPC, PLANE, PLANE, CELLS)
    x_BMC = torch.cat([x_BNC[:, :1], pooled_BTC], dim=1)
    x_BMC = read(first, x_BMC, torch.cat([x_BMC, image_BPC], dim=1))
    # What is read of the semantic tokens knows nothing of the centres.
    keys_BLC = torch.cat([x_BMC, image_BPC], dim=1)
    centres: Any = modules["centres"]
    x_BMC = torch.cat([x_BMC[:, :1], x_BMC[:, 1:] + centres.global_tokens], dim=1)
    x_BMC = read(second, x_BMC, keys_BLC)
    for layer in rest:
        x_BMC = layer(x_BMC)
    recovered_BPC = modules["recover"](image_BPC, x_BMC[:, 1:])
    return vit.layernorm(x_BMC[:, 0]), vit.layernorm(recovered_BPC)
