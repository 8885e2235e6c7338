"""The process that `foveate.video.isolate` decodes in; it never imports torch."""

from __future__ import annotations

import json
import os
import resource
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from foveate.errors import DecodeLimitError, MissingDependencyError, VideoError
from foveate.video.decode import PyAVReader, Scan
from foveate.video.parallel import DecodeStream
from foveate.video.source import MediaSource, import_av

# Frames of one message.
_PART = 8
# Address space that a codec thread reserves for its stack and the allocator.
_PER_THREAD = 16 << 20


def main() -> None:
    """Serve one file until the other end hangs up."""
    requests, replies = _channels()
    try:
        import_av()
        _send(replies, {"ready": True})
        head, data = _receive(requests)
        threads = int(head["threads"])
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        _limit_memory(int(head["memory"]) + 2 * threads * _PER_THREAD)
        cpu_seconds = int(head["cpu_seconds"])
        _limit_cpu(cpu_seconds)
        media = MediaSource(head["path"] or data)
        reader = PyAVReader(
            media,
            max_pixels=int(head["max_pixels"]),
            threads=threads,
            max_frames=int(head["max_frames"]),
        )
        scan = reader.scan()
        _send(replies, *_facts(scan))
        while True:
            head, data = _receive(requests)
            _limit_cpu(cpu_seconds)
            _serve(replies, reader, scan, head, data, threads)
    except (EOFError, BrokenPipeError):
        return
    except BaseException as error:
        _send(replies, _as_message(error))


def _channels() -> tuple[BinaryIO, BinaryIO]:
    """The two pipes; whatever prints goes nowhere."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb", buffering=0)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for file in (0, 1, 2):
        os.dup2(nowhere, file)
    return requests, replies


def _serve(
    replies: BinaryIO,
    reader: PyAVReader,
    scan: Scan,
    head: dict[str, Any],
    data: bytes,
    threads: int,
) -> None:
    """Decode what one request asks for, in small parts."""
    ranks = np.frombuffer(data, "<i8").tolist()
    # Parts must not straddle the caller's chunks.
    chunk = max(n for n in range(1, _PART + 1) if int(head["chunk"]) % n == 0)
    stream = DecodeStream(
        reader,
        scan.table,
        ranks,
        size=(int(head["size"][0]), int(head["size"][1])),
        chunk=chunk,
        # As many frames ahead as were asked for, in parts.
        ahead=(int(head["ahead"]) + 1) * int(head["chunk"]) // chunk,
        threads=threads,
        timeout=float(head["timeout"]),
        name=str(head.get("name", "")),
    )
    for filled in stream:
        _send(
            replies,
            {"shown": filled.shown, "suspect": list(filled.suspect)},
            filled.pixels_nCHW.data.cast("B"),
        )


def _facts(scan: Scan) -> tuple[dict[str, Any], bytes]:
    table = scan.table
    disposable_F = np.zeros(len(table), bool) if table.disposable_F is None else table.disposable_F
    bytes_F = np.zeros(len(table), np.int64) if table.bytes_F is None else table.bytes_F
    columns = np.stack([table.pts_F, table.position_F, table.key_F, disposable_F, bytes_F])
    turn = scan.orientation
    head = {
        "num_frames": len(table),
        "time_base": [table.time_base.numerator, table.time_base.denominator],
        "end_pts": table.end_pts,
        "by_order": table.by_order,
        "is_regular": table.is_regular,
        "codec": scan.codec,
        "container": scan.container,
        "height": scan.height,
        "width": scan.width,
        "orientation": [turn.transpose, turn.flip_x, turn.flip_y],
        "has_audio": scan.has_audio,
        "lost_frames": scan.lost_frames,
    }
    return head, columns.astype("<i8").tobytes()


def _as_message(error: BaseException) -> dict[str, Any]:
    cause = error
    while cause is not None and not isinstance(cause, MemoryError):
        cause = cause.__cause__
    if cause is not None:
        reason = "its decoder needs more memory than allowed"
        return {"error": "DecodeLimitError", "limit": "memory", "reason": reason}
    if isinstance(error, VideoError):
        limit = error.limit if isinstance(error, DecodeLimitError) else ""
        return {"error": type(error).__name__, "reason": error.reason[:1000], "limit": limit}
    if isinstance(error, MissingDependencyError):
        return {"error": "MissingDependencyError", "reason": str(error)[:1000]}
    return {"error": "", "reason": f"its decoder failed ({type(error).__name__}: {error})"[:1000]}


def _limit_memory(extra: int) -> None:
    """Address space: what is mapped by now, and `extra` bytes."""
    mapped = 1 << 30
    statm = Path("/proc/self/statm")
    if statm.exists():
        mapped = int(statm.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (mapped + extra, mapped + extra))


def _limit_cpu(seconds: int) -> None:
    """Processor time from now on; the kernel ends the process when it is used up."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime) + 1 + seconds
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def _receive(requests: BinaryIO) -> tuple[dict[str, Any], bytes]:
    head = json.loads(_read(requests, int.from_bytes(_read(requests, 8), "little")))
    return head, _read(requests, int(head["payload"]))


def _read(requests: BinaryIO, count: int) -> bytes:
    data = requests.read(count)
    if len(data) < count:
        raise EOFError
    return data


def _send(replies: BinaryIO, head: dict[str, Any], payload: Any = b"") -> None:
    text = json.dumps(head).encode()
    for part in (len(text).to_bytes(8, "little"), text, payload):
        view = memoryview(part)
        while len(view):
            view = view[replies.write(view) :]
