"""Reads a user's questions from JSON lines; what cannot be used is reported with its line."""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from foveate.bench.matching import LETTERS, PREFIX, normalise, without_letters

_KEYS = ("video", "question", "options", "answer", "task", "id")
_SHOWN = 5


def read_questions(path: Path) -> tuple[Path, list[dict[str, Any]], list[str]]:
    """The file, the fields of its items, and what was wrong with the other lines.

    Empty lines are passed over. Text is UTF-8 with or without a byte order mark, or UTF-16 with
    one; lines may end in CRLF.

    Args:
        path: a .jsonl file, or a folder that holds questions.jsonl or exactly one .jsonl file.

    Returns:
        The file read; one dictionary of `Item` fields per good line; "file:line: reason" per bad
        line.

    Raises:
        ValueError: there is no such file, or it holds no usable line.
    """
    file = _find(path)
    rows: list[dict[str, Any]] = []
    errors: list[str] = []
    taken: dict[str, int] = {}
    for number, raw in _lines(file):
        where = f"{file.name}:{number}"
        try:
            row = _read_line(raw, file.parent, where)
            if row["id"] in taken:
                raise ValueError(f"the id {row['id']!r} was taken by line {taken[row['id']]}")
        except ValueError as error:
            errors.append(f"{where}: {error}")
            continue
        taken[row["id"]] = number
        rows.append(row)
    if not rows:
        if not errors:
            raise ValueError(f"{file} is empty: write one JSON object per line.")
        more = f" (and {len(errors) - _SHOWN} more)" if len(errors) > _SHOWN else ""
        raise ValueError(f"{file} has no usable line: {'; '.join(errors[:_SHOWN])}{more}.")
    return file, rows, errors


def _find(path: Path) -> Path:
    path = path.expanduser()
    if path.is_file():
        return path
    if not path.is_dir():
        raise ValueError(
            f"{path}: no such file or folder; name world, a folder or a .jsonl file of questions."
        )
    if (path / "questions.jsonl").is_file():
        return path / "questions.jsonl"
    found = sorted(path.glob("*.jsonl"))
    if len(found) != 1:
        names = ", ".join(file.name for file in found) or "none"
        raise ValueError(
            f"{path} must hold questions.jsonl or exactly one .jsonl file; it holds {names}."
        )
    return found[0]


def _lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """Lines that are not empty, counted from 1."""
    data = file.read_bytes()
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = data.decode("utf-16", errors="replace").encode()
    # Only line feeds end a line: JSON text may hold other separators that splitlines() knows.
    for number, line in enumerate(data.removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if line.strip():
            yield number, line


def _read_line(raw: bytes, folder: Path, where: str) -> dict[str, Any]:
    try:
        entry = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text (byte {error.start + 1} of the line)") from error
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON ({error})") from error
    if not isinstance(entry, dict):
        raise ValueError(f"a line must be a JSON object, got {_kind(entry)}")
    missing = [key for key in ("video", "question", "answer") if entry.get(key) is None]
    if missing:
        raise ValueError(f"lacks {', '.join(missing)} (keys are {', '.join(_KEYS)})")
    video = _video(_text(entry, "video"), folder)
    options = _options(entry.get("options"))
    return {
        "id": _text(entry, "id", numbers=True) if entry.get("id") is not None else where,
        "clip_id": _clip_id(video, folder),
        "video": video,
        "question": _text(entry, "question"),
        "options": options,
        "answer": _answer(_text(entry, "answer", numbers=True), options),
        "task": _text(entry, "task") if entry.get("task") is not None else "all",
        "where": where,
    }


def _text(entry: dict[str, Any], key: str, numbers: bool = False) -> str:
    value = entry[key]
    if numbers and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        wanted = "text or a number" if numbers else "text"
        raise ValueError(f"{key} must be {wanted}, got {_kind(value)}")
    if not value.strip():
        raise ValueError(f"{key} is empty")
    return value.strip()


def _video(name: str, folder: Path) -> Path:
    path = folder / Path(name).expanduser()
    try:
        if path.is_file():
            return path
        reason = "is a folder" if path.is_dir() else "does not exist"
    except (OSError, ValueError) as error:  # a name that no file system takes
        reason = f"cannot be opened ({error})"
    hint = "; download it and give its path" if "://" in name else ""
    raise ValueError(f"the video {name} {reason}{hint}")


def _clip_id(video: Path, folder: Path) -> str:
    """The same for all spellings of a path."""
    whole = video.resolve()
    if whole.is_relative_to(folder.resolve()):
        return whole.relative_to(folder.resolve()).as_posix()
    return os.fspath(whole)


def _options(value: Any) -> tuple[str, ...]:
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise ValueError(f"options must be a list of texts, got {_kind(value)}")
    texts = [_text({"an option": option}, "an option", numbers=True) for option in value]
    if not 2 <= len(texts) <= len(LETTERS):
        raise ValueError(f"options must be 2 to {len(LETTERS)}, got {len(texts)}")
    texts = without_letters(texts)
    if len({normalise(text) for text in texts}) < len(texts):
        raise ValueError("two options are the same")
    return tuple(texts)


def _answer(text: str, options: tuple[str, ...]) -> str:
    """The answer; where there are options, the one that it names by text or letter."""
    if not options:
        return text
    for said in (text, PREFIX.sub("", text)):
        for option in options:
            if normalise(option) == normalise(said):
                return option
    letter = text.strip("(). :").upper()
    if len(letter) == 1 and letter in LETTERS[: len(options)]:
        return options[LETTERS.index(letter)]
    raise ValueError(f"the answer {text!r} is not among the options {', '.join(options)}")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "null")
