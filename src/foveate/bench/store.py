"""The folder of a run: three files that are readable at any moment and continue where they stop.

`run.json` says what is measured on what, `cells.jsonl` has a line for every finished cell,
`answers.jsonl` a line for every answer of a finished cell. A cell is written when it is whole:
answers first, then its line, so that answers without a cell are what a kill left and are dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, ClassVar

from foveate.core._files import write_text

VERSION = 1
UNTOUCHED = "untouched"
Key = tuple[str, float]

#: What must agree for a run to go on in a folder: key of run.json -> how a message calls it.
IDENTITY = {
    "model": "model",
    "model_id": "class and weights of the model",
    "suite": "suite",
    "suite_args": "arguments of the suite",
    "items": "number of questions",
    "questions": "questions",
    "frames": "frames",
    "scorer": "scorer",
    "seed": "seed",
    "max_new_tokens": "max_new_tokens",
    "device": "device",
    "dtype": "dtype",
    "foveate": "version of foveate",
}


def cell_key(row: Mapping[str, Any]) -> Key:
    """The recipe and budget that name a cell, from a line of either file."""
    return str(row["recipe"]), round(float(row["retain"]), 9)


class RunFolder:
    """The files of one run, opened for writing by one process at a time with `with`.

    Args:
        path: the folder; made on entering if it is missing.

    Raises:
        ValueError: it is a file, or holds something that is not a run.
        BlockingIOError: another process writes to it.
    """

    #: The file that says what is run, who writes it, and what must agree for a run to go on.
    document: ClassVar[str] = "run.json"
    command: ClassVar[str] = "foveate bench"
    identity: ClassVar[Mapping[str, str]] = IDENTITY

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        if self.path.exists() and not self.path.is_dir():
            raise ValueError(f"{self.path} is a file; give a folder for the results.")
        if self.path.is_dir() and not self._is_run() and self._foreign():
            raise ValueError(
                f"{self.path} is not empty and holds no run of {self.command} (no {self.document}, "
                f"but {self._foreign()[0]}); give another folder."
            )
        self._lock: IO[str] | None = None

    def _is_run(self) -> bool:
        return (self.path / self.document).is_file()

    def _foreign(self) -> list[str]:
        return sorted(p.name for p in self.path.iterdir() if not p.name.startswith("."))

    # -- one writer at a time -------------------------------------------------------------------

    def __enter__(self) -> RunFolder:
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("w")
        try:
            import fcntl
        except ImportError:  # Windows
            return self
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise BlockingIOError(
                f"another run is writing to {self.path} at this moment."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            with contextlib.suppress(OSError):
                (self.path / ".lock").unlink()
            self._lock.close()

    # -- reading --------------------------------------------------------------------------------

    def start(
        self, run: Mapping[str, Any], planned: Sequence[Key] = (), retry_failed: bool = False
    ) -> list[dict[str, Any]]:
        """Begin the run, or go on with it; gives the cells that are finished.

        What a kill cut off is repaired: a last line that is not whole, answers without a cell.

        Args:
            run: the content of run.json.
            planned: what this call is to measure; run.json keeps what all calls planned.
            retry_failed: take the cells away that ended in an error.

        Raises:
            ValueError: the folder holds another run; the message says what differs.
        """
        wanted = [list(key) for key in planned]
        if not self._is_run():
            self._write_run({"version": VERSION, **run, "planned": wanted})
            return []
        old = self._compare(run)
        before = old.get("planned", [])
        if added := [key for key in wanted if key not in before]:
            # Numbers of this call (its command, its date) do not replace those of the run.
            self._write_run({**old, "planned": before + added})
        lines = repair_lines(self.path / "cells.jsonl")
        cells = [line for line in lines if not (retry_failed and line.get("error"))]
        self._keep("cells.jsonl", cells, lines)
        answers = repair_lines(self.path / "answers.jsonl")
        finished = {cell_key(cell) for cell in cells if not cell.get("error")}
        kept = [row for row in answers if cell_key(row) in finished]
        self._keep("answers.jsonl", kept, answers)
        return cells

    def _keep(self, name: str, kept: list[dict[str, Any]], rows: list[dict[str, Any]]) -> None:
        if len(kept) < len(rows):
            write_text(self.path / name, "".join(map(_line, kept)))

    def _write_run(self, document: Mapping[str, Any]) -> None:
        write_text(
            self.path / self.document, json.dumps(document, indent=2, ensure_ascii=False) + "\n"
        )

    def _compare(self, run: Mapping[str, Any]) -> dict[str, Any]:
        """What the document holds, if it is of the same run."""
        try:
            old = json.loads((self.path / self.document).read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.path / 'run.json'} cannot be read: {error}.") from error
        if not isinstance(old, dict) or old.get("version") != VERSION:
            raise ValueError(
                f"{self.path / self.document} is not of this version of {self.command}."
            )
        mine = json.loads(json.dumps(run))
        differ = [
            f"{name} ({_short(old.get(key))} there, {_short(mine.get(key))} here)"
            for key, name in self.identity.items()
            if old.get(key) != mine.get(key)
        ]
        if differ:
            raise ValueError(
                f"{self.path} holds a different run: {'; '.join(differ)}. Give another folder, or "
                "the same arguments to go on with that run."
            )
        return old

    # -- writing --------------------------------------------------------------------------------

    def finish(self, cell: Mapping[str, Any], answers: Iterable[Mapping[str, Any]] = ()) -> None:
        """Add a finished cell and its answers."""
        append_lines(self.path / "answers.jsonl", answers)
        append_lines(self.path / "cells.jsonl", [cell])


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The rows of a JSON-lines file; a last line that was cut off is left out, no file is empty.

    Raises:
        ValueError: another line is not a JSON object.
    """
    return list(_parsed(path, path.read_bytes() if path.is_file() else b""))


def repair_lines(path: Path) -> list[dict[str, Any]]:
    """`read_lines`, after which the file ends with a whole line."""
    data = path.read_bytes() if path.is_file() else b""
    rows = list(_parsed(path, data))
    if data and (not data.endswith(b"\n") or len(rows) < data.count(b"\n")):
        write_text(path, "".join(map(_line, rows)))
    return rows


def _parsed(path: Path, data: bytes) -> Iterator[dict[str, Any]]:
    lines = [(n, line) for n, line in enumerate(data.split(b"\n"), 1) if line.strip(b" \r\0")]
    for position, (number, line) in enumerate(lines, 1):
        try:
            row = json.loads(line)
            cell_key(row)
        except (ValueError, KeyError, TypeError) as error:
            if position == len(lines):
                return
            raise ValueError(f"{path}:{number} is damaged ({error}); remove that line.") from error
        yield row


def append_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a JSON-lines file, on the disk when this returns."""
    text = "".join(map(_line, rows))
    if text:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _short(value: Any) -> str:
    text = json.dumps(value) if isinstance(value, dict | list) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
