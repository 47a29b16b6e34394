"""Clips per second of our loader against a PyTorch DataLoader with decord, torchcodec or PyAV.

    python benchmarks/loader.py --manifest clips.jsonl --json loader.json
    python benchmarks/loader.py --manifest clips.jsonl --groups 16 250 250:0 mixed --sizes 960x540
    python benchmarks/loader.py --manifest clips.jsonl --as-is

The clips of the manifest (without one: videos that the demo's packages carry, or made-up pictures
where they are not installed) are encoded anew as H.264, once for every size and group, where a
group is the distance of keyframes (`GOP` or `GOP:B-FRAMES`; 3 B-frames as x264 does by itself), and
`mixed` is one clip of each distance in turn. `--as-is` reads the manifest's files as they lie.

Both sides then do the same work in the same number of worker processes, one decoder thread in each:
the same clips in the same order, the same random frame of each of T segments, the same multi-scale
crop, Pillow BILINEAR resize and flip; the first batch of every side is compared with ours. Sides
alternate within a round, so that a disturbance meets all of them; ratios are of medians. On a busy
machine believe the CPU times. `pyav_float` also normalises to float32 in the worker, as the
released code does. Needs torch. The exit code is 1 where a rate is below `--goal`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import av
import numpy as np
from loader_baseline import READERS, PlainClips, installed
from PIL import Image

from iv2_jax.data import sources
from iv2_jax.data.decode import VideoReader
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.records import Clip
from iv2_jax.data.sources import open_source
from iv2_jax.demo import footage

_WARM_BATCHES = 3
_RATE = 30  # frames a second of what is encoded
_TILES = 4  # squares that move over the background of a made-up clip
_ALIKE = 2.0  # mean difference of 8-bit values up to which two converters' pictures are the same

Side = Callable[[], Iterator[np.ndarray]]


# -- clips ----------------------------------------------------------------------------------------


def made_up(seed: int) -> Iterator[np.ndarray]:
    """Endless pictures of 340x256: a blurred ground that moves, grain, and moving squares."""
    rng = np.random.default_rng(seed)
    ground = Image.fromarray(rng.integers(0, 256, (32, 43, 3), np.uint8))
    ground = np.asarray(ground.resize((340, 256), Image.Resampling.BICUBIC))
    grain = rng.integers(-6, 7, (8, 256, 340, 1), np.int16)
    t = 0
    while True:
        picture = np.roll(ground, t, axis=1).astype(np.int16) + grain[t % len(grain)]
        for k in range(_TILES):
            y, x = (40 * k + 2 * t) % 200, (70 * k + 3 * t * (k + 1)) % 290
            picture[y : y + 50, x : x + 50] = 60 * k
        yield np.clip(picture, 0, 255).astype(np.uint8)
        t += 1


def recorded(clip: Clip) -> Iterator[np.ndarray]:
    """Endless pictures of a real clip, from its beginning again at its end."""
    while True:
        with VideoReader(clip.path, start=clip.start, end=clip.end) as reader:
            for _, pixels in reader.walk():
                yield pixels


def find_footage(args: argparse.Namespace) -> list[Callable[[], Iterator[np.ndarray]]]:
    """What is encoded: `--clips` streams of pictures, the manifest's longest clips first."""
    if args.manifest:
        source = open_source(args.manifest, split=args.split)
        lengths = [len(source.open(i)) for i in range(len(source))]
        longest = sorted(range(len(source)), key=lambda i: -lengths[i])[: args.clips]
        return [lambda clip=source.clips[i]: recorded(clip) for i in longest]
    carried = (footage.BIKES, footage.BUNNY, footage.CITY)
    found = [path for path in (video.find() for video in carried) if path is not None]
    if found:
        return [lambda path=path: recorded(Clip("", str(path))) for path in found]
    print("no manifest, and the demo's packages are not installed: made-up pictures")
    return [lambda seed=seed: made_up(seed) for seed in range(args.clips)]


def encode(
    pictures: Iterable[np.ndarray], path: Path, *, size: tuple[int, int], length: int, group: str
) -> Clip:
    """Writes H.264 with a keyframe at least every so many frames, if it is not there."""
    if path.exists():  # with --keep
        return Clip(path.stem, str(path))
    distance, _, b_frames = group.partition(":")
    options = {"g": distance, "crf": "23", "preset": "medium", "bf": b_frames or "3"}
    partial = path.with_name(f"partial_{path.name}")
    with av.open(partial, "w") as output:
        stream = output.add_stream("libx264", rate=_RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for _, picture in zip(range(length), pictures, strict=False):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame = frame.reformat(*size, "yuv420p", interpolation="BICUBIC")
            frame.pts = None
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    partial.rename(path)
    return Clip(path.stem, str(path))


def make_sets(folder: Path, args: argparse.Namespace) -> dict[str, list[Clip]]:
    """Name -> clips, for every size and group."""
    folder.mkdir(parents=True, exist_ok=True)
    streams = find_footage(args)
    sets: dict[str, list[Clip]] = {}
    for size in args.sizes:
        width, height = (int(side) for side in size.split("x"))
        plain: dict[str, list[Clip]] = {}
        for group in args.groups:
            if group != "mixed":
                plain[group] = [
                    encode(
                        stream(),
                        folder / f"{size}_{group.replace(':', 'b')}_{i}.mp4",
                        size=(width, height),
                        length=args.length,
                        group=group,
                    )
                    for i, stream in enumerate(streams)
                ]
        if "mixed" in args.groups:
            every = [clips for group, clips in plain.items() if ":" not in group]
            plain["mixed"] = [every[i % len(every)][i] for i in range(len(streams))]
        sets |= {f"{size} GOP {group}": clips for group, clips in plain.items()}
    return sets


# -- measuring ------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Rate:
    """What one measurement gave; CPU time is of this process and its workers (Linux, else NaN)."""

    clips_per_second: float
    cpu_ms_per_clip: float


def cpu_seconds() -> float:
    """Processor time of this process and its worker processes so far."""
    ticks = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 1
    total = time.process_time()
    for child in multiprocessing.active_children():
        try:
            after_name = Path(f"/proc/{child.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return math.nan
        total += (int(after_name[11]) + int(after_name[12])) / ticks
    return total


def time_batches(batches: Iterator[np.ndarray], args: argparse.Namespace) -> Rate:
    """Clips per second, and CPU time for each, after a warm-up."""
    for _ in range(_WARM_BATCHES):
        next(batches)
    read, begin, used = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - begin < args.seconds or read < args.least * args.batch:
        next(batches)
        read += args.batch
    elapsed = time.perf_counter() - begin
    return Rate(read / elapsed, 1e3 * (cpu_seconds() - used) / read)


def ours(clips: list[Clip], args: argparse.Namespace) -> Iterator[np.ndarray]:
    """Batches of our loader."""
    config = DataConfig(
        source="", num_frames=args.frames, size=args.size, num_workers=args.workers, prefetch=2
    )
    source = sources.FileSource(clips)
    with make_loader(config, seed=0, global_batch=args.batch, source=source) as loader:
        for batch in loader:
            yield batch["video"]


def theirs(
    clips: list[Clip], args: argparse.Namespace, reader: str, *, normalise: bool = False
) -> Iterator[np.ndarray]:
    """Batches of the baseline."""
    import torch.utils.data

    paths = [clip.path for clip in clips]
    loader = torch.utils.data.DataLoader(
        PlainClips(paths, args.frames, args.size, reader=reader, normalise=normalise),
        batch_size=args.batch,
        num_workers=args.workers,
        prefetch_factor=2,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    try:
        for batch in batches:
            yield batch.numpy()
    finally:
        batches._shutdown_workers()


def compare(name: str, sides: dict[str, Side]) -> dict[str, float]:
    """Mean difference of every side's first batch from ours; ends the run if one is not ours."""
    first = {}
    for side, batches in sides.items():
        stream = batches()
        first[side] = next(stream)
        stream.close()
    differences = {}
    for side, batch in first.items():
        if side != "ours" and batch.dtype == np.uint8:
            apart = np.abs(batch.astype(np.int16) - first["ours"]).mean()
            differences[side] = round(float(apart), 3)
            if apart > _ALIKE:
                sys.exit(f"{name}: {side} reads other pictures than ours, {apart:.1f} levels apart")
    return differences


def measure(name: str, clips: list[Clip], args: argparse.Namespace) -> dict:
    """Alternates the sides on one set and prints and returns the figures."""
    sides: dict[str, Side] = {"ours": lambda: ours(clips, args)}
    for reader in args.against:
        sides[reader] = lambda reader=reader: theirs(clips, args, reader)
    if args.floats:
        sides["pyav_float"] = lambda: theirs(clips, args, "pyav", normalise=True)
    differences = compare(name, sides)
    measured: dict[str, list[Rate]] = {side: [] for side in sides}
    load = os.getloadavg()[0]
    for _ in range(args.rounds):
        for side, batches in sides.items():
            stream = batches()
            measured[side].append(time_batches(stream, args))
            stream.close()
    rates = {n: statistics.median(r.clips_per_second for r in m) for n, m in measured.items()}
    costs = {n: statistics.median(r.cpu_ms_per_clip for r in m) for n, m in measured.items()}
    print(f"{name}: {len(clips)} clips, {args.workers} workers, load before {load:.1f}")
    for side, rate in rates.items():
        print(
            f"  {side:10} {rate:7.1f} clips/s {costs[side]:7.1f} ms CPU a clip   ours: "
            f"{rates['ours'] / rate:.2f} x the clips, {costs[side] / costs['ours']:.2f} x for the "
            f"same CPU time   pictures {differences.get(side, 0.0):g} levels apart",
            flush=True,
        )
    others = {side: rate for side, rate in rates.items() if side != "ours"}
    return {
        "clips": len(clips),
        "megabytes": sum(os.path.getsize(clip.path) for clip in clips) / 1e6,
        "load_before": load,
        "measured": {n: [dataclasses.asdict(r) for r in m] for n, m in measured.items()},
        "levels_apart": differences,
        "times_the_clips": {side: rates["ours"] / rate for side, rate in others.items()},
        "times_for_the_cpu": {side: costs[side] / costs["ours"] for side in others},
    }


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", help="real clips to encode anew")
    parser.add_argument("--split", help="of the manifest")
    parser.add_argument("--as-is", action="store_true", help="do not encode the manifest anew")
    parser.add_argument("--keep", metavar="FOLDER", help="keep what is encoded, and use it again")
    parser.add_argument("--groups", nargs="+", default=["12", "16", "48", "250", "mixed"])
    parser.add_argument("--sizes", nargs="+", default=["340x256", "960x540"])
    parser.add_argument("--clips", type=int, default=8, help="for each group (default: 8)")
    parser.add_argument("--length", type=int, default=300, help="their frames (default: 300)")
    parser.add_argument("--against", nargs="+", choices=READERS, help="default: all installed")
    parser.add_argument("--floats", action="store_true", help="also measure pyav_float")
    parser.add_argument("--frames", type=int, default=8, help="frames a clip (default: 8)")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--batch", type=int, default=4, help="clips a batch (default: 4)")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--least", type=int, default=10, help="batches of each (default: 10)")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides (default: 3)")
    parser.add_argument("--goal", type=float, default=1.2, help="times the clips (default: 1.2)")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args()
    if args.as_is and not args.manifest:
        parser.error("--as-is reads the files of a --manifest")
    args.against = args.against or installed()
    return args


def main() -> int:
    """Makes the sets, measures, writes; 1 when a rate is below the goal."""
    args = parse()
    with tempfile.TemporaryDirectory() as folder:
        if args.as_is:
            source = open_source(args.manifest, split=args.split)
            enough = 2 * args.frames  # PyAV's baseline cannot take T frames of fewer
            clips = [c for i, c in enumerate(source.clips) if len(source.open(i)) >= enough]
            sets = {os.path.basename(args.manifest): clips}
        else:
            sets = make_sets(Path(args.keep or folder), args)
        figures = {name: measure(name, clips, args) for name, clips in sets.items()}
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k not in ("json", "keep", "manifest")}
        written = {"cores": multiprocessing.cpu_count(), "settings": settings, "sets": figures}
        Path(args.json).write_text(json.dumps(written, indent=2) + "\n")
    low = [
        f"{name} against {side}: {ratio:.2f}"
        for name, found in figures.items()
        for side, ratio in found["times_the_clips"].items()
        if ratio < args.goal
    ]
    print(f"below {args.goal} x: {'; '.join(low) or 'none'}")
    return int(bool(low))


if __name__ == "__main__":
    sys.exit(main())
