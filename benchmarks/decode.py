"""Time from a file to a batch of frames, beside other decoders: same clips, frames and size.

    python benchmarks/decode.py --rounds 5 --cores 1 2 --write docs/decoding.md

Every decoder runs in a process of its own that stays, pinned to the cores of the row, and is asked
in turn, so that a busy machine hurts all; a ratio is the median over rounds of times taken one
after the other. Opening the file counts. Decoders that are not installed are named and left out;
two that share a module name need folders of their own: --site decord2=FOLDER (made by
`pip install --target FOLDER --no-deps decord2`). The three-minute clip is made once, into --folder.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from fractions import Fraction
from pathlib import Path
from typing import Any

PEERS = ("pyav", "torchcodec", "decord", "decord2", "deepcodec")
NAMES = {
    "foveate": "foveate",
    "pyav": "PyAV in a row",
    "torchcodec": "torchcodec",
    "decord": "decord",
    "decord2": "decord2",
    "deepcodec": "QuickVideo's (deepcodec)",
}
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"


def make_long_clip(path: Path, seconds: int = 180) -> None:
    """1280x720 at 25 frames a second, x264 as it is by default: a real clip, over and over."""
    import av

    from foveate.video import sample_clip

    with av.open(str(sample_clip("bigbuckbunny"))) as container:
        frames = [frame.reformat(format="yuv420p") for frame in container.decode(video=0)]
    part = path.with_suffix(".part.mp4")
    with av.open(str(part), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt = 1280, 720, "yuv420p"
        stream.options = {"preset": "medium", "crf": "23"}
        for i in range(25 * seconds):
            frame = frames[i % len(frames)]
            frame.pts, frame.time_base, frame.pict_type = i, Fraction(1, 25), 0
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    part.rename(path)


# One function per decoder: (path, ranks, side, cores) -> frames.


def _foveate() -> Callable[..., Any]:
    from foveate.video import Clip

    return lambda path, ranks, side, cores: Clip(path, threads=cores).take(ranks, size=(side, side))


def _pyav() -> Callable[..., Any]:
    import av
    import numpy as np

    def read(path: str, ranks: list[int], side: int, cores: int) -> Any:
        wanted, last, found = set(ranks), max(ranks), []
        converter = av.video.reformatter.VideoReformatter()
        with av.open(path) as container:
            context = container.streams.video[0].codec_context
            context.thread_type, context.thread_count = "AUTO" if cores > 1 else "NONE", cores
            for i, frame in enumerate(container.decode(video=0)):
                if i in wanted:
                    rgb = converter.reformat(
                        frame, side, side, format="rgb24", interpolation="BICUBIC"
                    )
                    found.append(rgb.to_ndarray().transpose(2, 0, 1))
                if i == last:
                    break
        return np.stack(found)

    return read


def _torchcodec() -> Callable[..., Any]:
    from torchcodec.decoders import VideoDecoder
    from torchcodec.transforms import Resize

    return lambda path, ranks, side, cores: (
        VideoDecoder(path, num_ffmpeg_threads=cores, transforms=[Resize((side, side))])
        .get_frames_at(ranks)
        .data
    )


def _decord() -> Callable[..., Any]:
    import decord

    return lambda path, ranks, side, cores: (
        decord.VideoReader(path, width=side, height=side, num_threads=cores)
        .get_batch(ranks)
        .asnumpy()
    )


def _deepcodec() -> Callable[..., Any]:
    from deepcodec.vfast import vfast_load

    return lambda path, ranks, side, cores: vfast_load(
        path, ranks, height=side, width=side, num_threads=cores, interpolation="BICUBIC"
    )


def _limit() -> Callable[..., Any]:
    """Only what must be decoded, by one thread, with nothing made of it; opening not counted."""
    import av

    from foveate.video import Clip
    from foveate.video.jobs import schedule
    from foveate.video.table import needed

    def read(path: str, ranks: list[int], side: int, cores: int) -> float:
        table = Clip(path)._table
        runs = [(group, needed(table, group)[1]) for group in schedule(table, ranks, 1).groups]
        with av.open(path) as container:
            stream = container.streams.video[0]
            packets = [packet for packet in container.demux(stream) if packet.size]
            context = stream.codec_context
            context.thread_type, context.thread_count = "NONE", 1
            begin = time.perf_counter()
            for group, skip in runs:
                for position in range(group.start, group.stop + 1):
                    if position not in skip:
                        context.decode(packets[position])
                context.decode(None)
                context.flush_buffers()
            return (time.perf_counter() - begin) / cores

    return read


LOADERS = {
    "foveate": _foveate,
    "pyav": _pyav,
    "torchcodec": _torchcodec,
    "decord": _decord,
    "decord2": _decord,
    "deepcodec": _deepcodec,
    "limit": _limit,
}


def serve(name: str) -> None:
    """A process of one decoder: a request a line in, seconds (or an error) a line out."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    try:
        read = LOADERS[name]()
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"[:200]}), file=answers)
        return
    print(json.dumps({}), file=answers, flush=True)
    allowed = sorted(os.sched_getaffinity(0))
    for line in sys.stdin:
        path, ranks, side, cores = json.loads(line)
        os.sched_setaffinity(0, allowed[:cores])
        begin = time.perf_counter()
        try:
            got = read(path, ranks, side, cores)
            seconds = got if isinstance(got, float) else time.perf_counter() - begin
            answer: dict[str, Any] = {"seconds": seconds}
            shape = list(getattr(getattr(got, "pixels", got), "shape", [len(ranks)]))
            if shape[0] != len(ranks):
                answer = {"error": f"gave {shape[0]} frames"}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:200]}
        print(json.dumps(answer), file=answers, flush=True)


class Decoder:
    """The other end of `serve`."""

    def __init__(self, name: str, site: str | None) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        if site:
            environment["PYTHONPATH"] = os.pathsep.join(
                [site, *filter(None, [environment.get("PYTHONPATH")])]
            )
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.error = self._answer().get("error")

    def seconds(self, *request: Any) -> float | str:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = self._answer()
        return answer.get("seconds", answer.get("error", ""))

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        return json.loads(line) if line else {"error": f"ended ({self.process.wait()})"}


def cases(folder: Path) -> list[tuple[str, str, list[int]]]:
    """(clip, what, ranks) of every row; the path is found again by the clip's name."""
    from foveate.video import Clip

    rows = []
    for name, path in clips(folder).items():
        clip = Clip(path)
        at_rate = clip.stream(1.0)
        rows.append((name, "32 uniform", [int(i) for i in _spread(len(clip), 32)]))
        rows.append((name, "1 per second", at_rate.index.tolist()))
    return rows


def _spread(count: int, n: int) -> list[int]:
    from foveate.video.sampling import sample_ranks

    return sample_ranks(count, n).tolist()


def clips(folder: Path) -> dict[str, Path]:
    from foveate.video import sample_clip

    long_clip = folder / "long720.mp4"
    if not long_clip.exists():
        print("making the three-minute clip ...", flush=True)
        make_long_clip(long_clip)
    short = {name: sample_clip(name) for name in ("bikes", "bigbuckbunny", "carphone")}
    return {"3 minutes": long_clip, **short}


def measure(
    decoders: dict[str, Decoder], folder: Path, options: argparse.Namespace
) -> list[dict[str, Any]]:
    paths = clips(folder)
    rows = []
    for clip, what, ranks in cases(folder):
        if options.only and options.only not in f"{clip} {what}":
            continue
        for cores in options.cores:
            times: dict[str, list[float]] = {name: [] for name in decoders}
            errors: dict[str, str] = {}
            rounds = options.rounds if clip == "3 minutes" else 3 * options.rounds
            for turn in range(rounds + 1):
                for name, decoder in decoders.items():
                    if name in errors:
                        continue
                    got = decoder.seconds(str(paths[clip]), ranks, options.size, cores)
                    if isinstance(got, str):
                        errors[name] = got
                    elif turn or clip == "3 minutes":  # the first of a short clip warms up
                        times[name].append(got)
            rows.append({"clip": clip, "what": what, "cores": cores, "times": times, **errors})
            print(describe(rows[-1]), flush=True)
    return rows


def ratio(row: dict[str, Any], name: str) -> float | None:
    """How many times as long as ours, median over rounds."""
    times, ours = row["times"][name], row["times"]["foveate"]
    if not times or len(times) != len(ours):
        return None
    return statistics.median(b / a for a, b in zip(ours, times, strict=True))


def describe(row: dict[str, Any]) -> str:
    parts = [f"{row['clip']}, {row['what']}, {row['cores']} cores:"]
    for name, times in row["times"].items():
        if times:
            parts.append(f"{name} {statistics.median(times):.3f} s ({ratio(row, name):.2f})")
        else:
            parts.append(f"{name}: {row.get(name)}")
    return " ".join(parts)


def table(rows: list[dict[str, Any]], peers: list[str]) -> list[str]:
    heads = ["Clip", "Frames", "Cores", "foveate", *(NAMES[p] for p in peers), "limit"]
    lines = [f"| {' | '.join(heads)} |", f"| {' | '.join(['---'] * len(heads))} |"]
    for row in rows:
        ours = statistics.median(row["times"]["foveate"])
        cells = [row["clip"], row["what"], str(row["cores"]), f"{1000 * ours:,.0f} ms"]
        for peer in [*peers, "limit"]:
            value = ratio(row, peer)
            cell = "failed" if value is None else f"{value:.2f}x"
            cells.append(f"{100 * (value or 0):.0f} %" if peer == "limit" else cell)
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def page(rows: list[dict[str, Any]], missing: dict[str, str], command: str) -> str:
    peers = [p for p in PEERS if p not in missing]
    lines = table(rows, peers)
    lines += ["", f"{hardware()}; {date.today()}; `{command}`. {versions()}"]
    if missing:
        left_out = "; ".join(f"{NAMES[p]} ({why})" for p, why in missing.items())
        lines += ["", f"Not installed there: {left_out}."]
    return "\n".join(lines)


def hardware() -> str:
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        named = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        model = named[0].split(":")[1].strip() if named else model
    return f"{model}, {os.cpu_count()} cores"


def versions() -> str:
    import av
    import torch

    ffmpeg = ".".join(map(str, av.library_versions["libavcodec"]))
    return f"PyAV {av.__version__} (libavcodec {ffmpeg}), torch {torch.__version__}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="three times as many on short clips")
    parser.add_argument("--cores", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--size", type=int, default=448, help="frames come out square, pixels")
    parser.add_argument("--folder", type=Path, default=Path.home() / ".cache" / "foveate")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS)
    parser.add_argument("--site", nargs="*", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--only", help="rows whose name holds this text")
    parser.add_argument("--write", type=Path, help="page whose table is replaced")
    parser.add_argument("--serve", choices=LOADERS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        serve(options.serve)
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    sites = dict(item.split("=", 1) for item in options.site)
    started = {
        name: Decoder(name, sites.get(name)) for name in ("foveate", *options.peers, "limit")
    }
    missing = {name: decoder.error for name, decoder in started.items() if decoder.error}
    for name, why in missing.items():
        print(f"left out: {name}: {why}", flush=True)
    decoders = {name: decoder for name, decoder in started.items() if not decoder.error}
    rows = measure(decoders, options.folder, options)
    command = f"python benchmarks/decode.py --rounds {options.rounds} --size {options.size}"
    text = page(rows, missing, command)
    print(text)
    if options.write:
        before, _, rest = options.write.read_text().partition(BEGIN)
        after = rest.partition(END)[2]
        options.write.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    for decoder in started.values():
        decoder.process.kill()
        decoder.process.wait()


if __name__ == "__main__":
    main()
