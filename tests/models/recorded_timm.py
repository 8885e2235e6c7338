"""The interface of timm 1.0.31's VisionTransformer, recorded: a stand-in where timm is not there.

timm needs torchvision, so it cannot be a test dependency. Names of classes, attributes, arguments
and methods and the order of calls are those of `timm.models.vision_transformer.VisionTransformer`,
`timm.models.deit.VisionTransformerDistilled` and of `timm.layers` (Attention, PatchEmbed, DropPath,
LayerScale, Mlp, SwiGLUPacked) in release 1.0.31, for what the adapter touches; the lines are ours.
With timm importable, `test_timm_encoders.py` runs on the real classes as well, and compares them
with these on equal weights.

Legend: B images, N tokens, C channels, H heads, d head channels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

VERSION = "1.0.31"


class PatchEmbed(nn.Module):
    def __init__(self, img_size, patch_size, in_chans, embed_dim, bias, dynamic: bool) -> None:
        super().__init__()
        self.patch_size = (patch_size, patch_size)
        self.img_size = (img_size, img_size)
        self.grid_size = (img_size // patch_size, img_size // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.flatten, self.strict_img_size = not dynamic, not dynamic
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size, bias=bias)
        self.norm = nn.Identity()

    def feat_ratio(self, as_scalar=True):
        return max(self.patch_size) if as_scalar else self.patch_size

    def dynamic_feat_size(self, img_size):
        return tuple(size // patch for size, patch in zip(img_size, self.patch_size, strict=True))

    def forward(self, x):
        if self.strict_img_size:
            assert tuple(x.shape[2:]) == self.img_size
        x = self.proj(x)
        x = x.flatten(2).transpose(1, 2) if self.flatten else x.permute(0, 2, 3, 1)
        return self.norm(x)


class LayerScale(nn.Module):
    def __init__(self, dim, init_values) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init_values)))

    def forward(self, x):
        return x * self.gamma


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x):
        if not self.training or self.drop_prob == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1 - self.drop_prob)
        return x * kept / (1 - self.drop_prob)


class Attention(nn.Module):
    def __init__(self, dim, num_heads, qkv_bias, qk_norm, scale_norm, norm_layer) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.attn_dim, self.scale = dim, self.head_dim**-0.5
        self.fused_attn = True
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.q_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.k_norm = norm_layer(self.head_dim) if qk_norm else nn.Identity()
        self.attn_drop = nn.Dropout(0.0)
        self.norm = norm_layer(dim) if scale_norm else nn.Identity()
        self.gate = None
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(0.0)

    def forward(self, x, attn_mask=None, is_causal=False):
        B, N, _ = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.fused_attn:
            x = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, is_causal=is_causal)
        else:
            logits = q * self.scale @ k.transpose(-2, -1)
            logits = logits if attn_mask is None else logits + attn_mask
            x = self.attn_drop(logits.softmax(dim=-1)) @ v
        x = x.transpose(1, 2).reshape(B, N, self.attn_dim)
        return self.proj_drop(self.proj(self.norm(x)))


class Mlp(nn.Module):
    def __init__(self, in_features, hidden_features) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.GELU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features, in_features)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class SwiGLUPacked(nn.Module):
    """`GluMlp` with SiLU on its first half: `fc1` gives both halves."""

    def __init__(self, in_features, hidden_features) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.act = nn.SiLU()
        self.drop1 = nn.Dropout(0.0)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden_features // 2, in_features)
        self.drop2 = nn.Dropout(0.0)

    def forward(self, x):
        gate, x = self.fc1(x).chunk(2, dim=-1)
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(gate) * x))))


class Block(nn.Module):
    def __init__(
        self,
        dim,
        num_heads,
        mlp_ratio=4.0,
        qkv_bias=True,
        qk_norm=False,
        scale_attn_norm=False,
        init_values=None,
        drop_path=0.0,
        norm_layer=nn.LayerNorm,
        mlp_layer=Mlp,
    ) -> None:
        super().__init__()
        self.norm1 = norm_layer(dim)
        self.attn = Attention(dim, num_heads, qkv_bias, qk_norm, scale_attn_norm, norm_layer)
        self.ls1 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path1 = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = norm_layer(dim)
        self.mlp = mlp_layer(in_features=dim, hidden_features=int(dim * mlp_ratio))
        self.ls2 = LayerScale(dim, init_values) if init_values else nn.Identity()
        self.drop_path2 = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x, attn_mask=None, is_causal=False):
        seen = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)
        x = x + self.drop_path1(self.ls1(seen))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class ResPostBlock(nn.Module):
    """Norms behind the branches; the adapter refuses it."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0, norm_layer=nn.LayerNorm, **_: Any) -> None:
        super().__init__()
        self.attn = Attention(dim, num_heads, True, False, False, norm_layer)
        self.norm1, self.norm2 = norm_layer(dim), norm_layer(dim)
        self.drop_path1, self.drop_path2 = nn.Identity(), nn.Identity()
        self.mlp = Mlp(in_features=dim, hidden_features=int(dim * mlp_ratio))

    def forward(self, x, attn_mask=None, is_causal=False):
        x = x + self.drop_path1(self.norm1(self.attn(x, attn_mask=attn_mask)))
        return x + self.drop_path2(self.norm2(self.mlp(x)))


class VisionTransformer(nn.Module):
    def __init__(
        self,
        img_size=224,
        patch_size=16,
        in_chans=3,
        num_classes=1000,
        global_pool="token",
        embed_dim=768,
        depth=12,
        num_heads=12,
        class_token=True,
        pos_embed="learn",
        no_embed_class=False,
        reg_tokens=0,
        pre_norm=False,
        fc_norm=None,
        pool_include_prefix=False,
        dynamic_img_size=False,
        drop_path_rate=0.0,
        block_fn=Block,
        **of_blocks: Any,
    ) -> None:
        super().__init__()
        norm_layer = of_blocks.setdefault("norm_layer", lambda dim: nn.LayerNorm(dim, eps=1e-6))
        means = global_pool in ("avg", "avgmax", "max")
        use_fc_norm = means if fc_norm is None else fc_norm
        self.num_classes, self.global_pool, self.embed_dim = num_classes, global_pool, embed_dim
        self.num_features = embed_dim
        self.num_prefix_tokens = int(class_token) + reg_tokens
        self.num_reg_tokens, self.has_class_token = reg_tokens, class_token
        self.no_embed_class, self.pool_include_prefix = no_embed_class, pool_include_prefix
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False
        self.patch_embed = PatchEmbed(
            img_size, patch_size, in_chans, embed_dim, not pre_norm, dynamic_img_size
        )
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, reg_tokens, embed_dim)) if reg_tokens else None
        places = self.patch_embed.num_patches + (0 if no_embed_class else self.num_prefix_tokens)
        has_places = pos_embed not in ("", "none")
        self.pos_embed = nn.Parameter(torch.zeros(1, places, embed_dim)) if has_places else None
        self.pos_drop = nn.Dropout(0.0)
        self.patch_drop = nn.Identity()
        self.norm_pre = norm_layer(embed_dim) if pre_norm else nn.Identity()
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.Sequential(
            *[block_fn(embed_dim, num_heads, drop_path=rate, **of_blocks) for rate in rates]
        )
        self.norm = nn.Identity() if use_fc_norm else norm_layer(embed_dim)
        self.attn_pool = None
        self.fc_norm = norm_layer(embed_dim) if use_fc_norm else nn.Identity()
        self.head_drop = nn.Dropout(0.0)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()

    def _prefix(self, batch: int) -> list[torch.Tensor]:
        return [
            token.expand(batch, -1, -1)
            for token in (self.cls_token, self.reg_token)
            if token is not None
        ]

    def _pos_embed(self, x):
        prefix = self._prefix(x.shape[0])
        if self.pos_embed is None:
            return torch.cat([*prefix, x.view(x.shape[0], -1, x.shape[-1])], dim=1)
        places = self.pos_embed
        if self.dynamic_img_size:
            num = 0 if self.no_embed_class else self.num_prefix_tokens
            if tuple(x.shape[1:3]) != self.patch_embed.grid_size:
                plane = places[:, num:].unflatten(1, self.patch_embed.grid_size)
                plane = plane.permute(0, 3, 1, 2)
                plane = F.interpolate(plane, x.shape[1:3], mode="bicubic", antialias=True)
                places = torch.cat([places[:, :num], plane.flatten(2).transpose(1, 2)], dim=1)
            x = x.flatten(1, 2)
        if self.no_embed_class:
            x = torch.cat([*prefix, x + places], dim=1)
        else:
            x = torch.cat([*prefix, x], dim=1) + places
        return self.pos_drop(x)

    def forward_features(self, x, attn_mask=None, is_causal=False):
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        if attn_mask is not None or is_causal:
            for block in self.blocks:
                x = block(x, attn_mask=attn_mask, is_causal=is_causal)
        else:
            x = self.blocks(x)
        return self.norm(x)

    def forward_intermediates(self, x, indices=None, norm=False, output_fmt="NCHW"):
        """Of the recorded one, the planes behind some blocks."""
        rows, columns = self.patch_embed.dynamic_feat_size(x.shape[2:])
        y, planes = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x)))), []
        for index, block in enumerate(self.blocks):
            y = block(y)
            if indices is None or index in indices:
                patches = (self.norm(y) if norm else y)[:, self.num_prefix_tokens :]
                planes.append(patches.reshape(x.shape[0], rows, columns, -1).permute(0, 3, 1, 2))
        return self.norm(y), planes

    def pool(self, x):
        if self.global_pool == "token":
            return x[:, 0]
        if not self.global_pool:
            return x
        x = x if self.pool_include_prefix else x[:, self.num_prefix_tokens :]
        if self.global_pool == "avg":
            return x.mean(dim=1)
        largest = x.amax(dim=1)
        return largest if self.global_pool == "max" else 0.5 * (largest + x.mean(dim=1))

    def forward_head(self, x, pre_logits=False):
        x = self.head_drop(self.fc_norm(self.pool(x)))
        return x if pre_logits else self.head(x)

    def forward(self, x, attn_mask=None, is_causal=False):
        return self.forward_head(self.forward_features(x, attn_mask, is_causal))


class VisionTransformerDistilled(VisionTransformer):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.num_prefix_tokens = 2
        self.dist_token = nn.Parameter(torch.zeros(1, 1, self.embed_dim))
        num = self.patch_embed.num_patches + 2
        self.pos_embed = nn.Parameter(torch.zeros(1, num, self.embed_dim))
        classes = self.num_classes
        self.head_dist = nn.Linear(self.embed_dim, classes) if classes > 0 else nn.Identity()

    def _prefix(self, batch: int) -> list[torch.Tensor]:
        return [token.expand(batch, -1, -1) for token in (self.cls_token, self.dist_token)]

    def forward_head(self, x, pre_logits=False):
        x, x_dist = x[:, 0], x[:, 1]
        if pre_logits:
            return (x + x_dist) / 2
        return (self.head(x) + self.head_dist(x_dist)) / 2
