"""Clips per second of our loader against a plain PyTorch DataLoader, in one run.

    python benchmarks/loader.py --workers 2 --json loader.json
    python benchmarks/loader.py --manifest clips.jsonl --split train

Both sides read the same clips with PyAV, one decoder thread in each of the same number of worker
processes, take one random frame of each of T segments, and make the stage-1 training pictures
(multi-scale crop, Pillow BILINEAR resize, flip). The baseline decodes in order up to the last
wanted frame, as the released loaders do, and comes in two forms: `torch` hands over uint8 like
ours, `torch_float` normalises to float32 in the worker like the released code. Rounds alternate,
so that a disturbance meets all sides; the ratios are of medians. Needs torch.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import multiprocessing
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

import av
import numpy as np
from PIL import Image

from iv2_jax.data import augment, sources
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.records import Clip

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_WARM_BATCHES = 3
_TILES = 4  # squares that move over the background of a made-up clip


def make_clips(folder: Path, count: int, frames: int) -> list[Clip]:
    """Encodes clips of 340x256 at 30 frames a second, as Kinetics copies usually are stored."""
    clips = []
    for i in range(count):
        path = folder / f"{i}.mp4"
        rng = np.random.default_rng(i)
        ground = Image.fromarray(rng.integers(0, 256, (32, 43, 3), np.uint8))
        ground = np.asarray(ground.resize((340, 256), Image.Resampling.BICUBIC))
        grain = rng.integers(-6, 7, (8, 256, 340, 1), np.int16)
        with av.open(path, "w") as output:
            stream = output.add_stream("libx264", rate=30)
            stream.width, stream.height, stream.pix_fmt = 340, 256, "yuv420p"
            for t in range(frames):
                picture = np.roll(ground, t, axis=1).astype(np.int16) + grain[t % len(grain)]
                for k in range(_TILES):
                    y, x = (40 * k + 2 * t) % 200, (70 * k + 3 * t * (k + 1)) % 290
                    picture[y : y + 50, x : x + 50] = 60 * k
                picture = np.clip(picture, 0, 255).astype(np.uint8)
                output.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            output.mux(stream.encode(None))
        clips.append(Clip(str(i), str(path)))
    return clips


class PlainClips:
    """A map-style data set written the usual way."""

    def __init__(self, paths: list[str], num_frames: int, size: int, *, normalise: bool) -> None:
        """Takes the files and the shape to give."""
        self.paths = paths
        self.num_frames = num_frames
        self.size = size
        self.normalise = normalise

    def __len__(self) -> int:
        """Practically endless."""
        return 1 << 30

    def __getitem__(self, item: int) -> np.ndarray:
        """(T, S, S, 3) uint8, or (3, T, S, S) float32."""
        images = self._decode(self.paths[random.Random(item).randrange(len(self.paths))])
        width, height = images[0].size
        crop_w, crop_h = random.choice(augment.crop_sizes(width, height, self.size))
        x, y = random.choice(augment.crop_offsets(width, height, (crop_w, crop_h)))
        box, target = (x, y, x + crop_w, y + crop_h), (self.size, self.size)
        images = [im.crop(box).resize(target, Image.Resampling.BILINEAR) for im in images]
        if random.random() < 0.5:
            images = [im.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for im in images]
        video = np.stack([np.asarray(im) for im in images])
        if not self.normalise:
            return video
        scaled = (video.astype(np.float32) / 255 - _MEAN) / _STD
        return np.ascontiguousarray(scaled.transpose(3, 0, 1, 2))

    def _decode(self, path: str) -> list[Image.Image]:
        """One random frame of each segment."""
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.thread_type, stream.codec_context.thread_count = "NONE", 1
            segment = stream.frames // self.num_frames
            wanted = [i * segment + random.randrange(segment) for i in range(self.num_frames)]
            images = []
            for at, frame in enumerate(container.decode(stream)):
                if at in wanted:
                    images.append(frame.to_image())
                if at == wanted[-1]:
                    break
        return images


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


def time_batches(batches, batch: int, seconds: float) -> Rate:
    """Clips per second, and CPU time for each, after a warm-up."""
    for _ in range(_WARM_BATCHES):
        next(batches)
    read, begin, used = 0, time.perf_counter(), cpu_seconds()
    while time.perf_counter() - begin < seconds:
        next(batches)
        read += batch
    elapsed = time.perf_counter() - begin
    return Rate(read / elapsed, 1e3 * (cpu_seconds() - used) / read)


def time_ours(clips: list[Clip], args: argparse.Namespace) -> Rate:
    """Our loader."""
    config = DataConfig(
        source="", num_frames=args.frames, size=args.size, num_workers=args.workers, prefetch=2
    )
    source = sources.FileSource(clips)
    with make_loader(config, seed=0, global_batch=args.batch, source=source) as loader:
        return time_batches(loader, args.batch, args.seconds)


def time_torch(clips: list[Clip], args: argparse.Namespace, *, normalise: bool) -> Rate:
    """The baseline."""
    import torch.utils.data

    paths = [clip.path for clip in clips]
    loader = torch.utils.data.DataLoader(
        PlainClips(paths, args.frames, args.size, normalise=normalise),
        batch_size=args.batch,
        num_workers=args.workers,
        prefetch_factor=2,
        multiprocessing_context="fork",
    )
    batches = iter(loader)
    try:
        return time_batches(batches, args.batch, args.seconds)
    finally:
        batches._shutdown_workers()


def run(clips: list[Clip], args: argparse.Namespace) -> dict:
    """Alternates the sides and prints and returns the figures."""
    sides = {
        "ours": lambda: time_ours(clips, args),
        "torch": lambda: time_torch(clips, args, normalise=False),
        "torch_float": lambda: time_torch(clips, args, normalise=True),
    }
    measured: dict[str, list[Rate]] = {name: [] for name in sides}
    load = os.getloadavg()[0]
    for _ in range(args.rounds):
        for name, side in sides.items():
            measured[name].append(side())
    rates = {n: statistics.median(r.clips_per_second for r in m) for n, m in measured.items()}
    costs = {n: statistics.median(r.cpu_ms_per_clip for r in m) for n, m in measured.items()}
    print(f"{len(clips)} clips, {args.workers} workers, load before {load:.2f}")
    for name, rate in rates.items():
        print(
            f"{name:12} {rate:8.1f} clips/s  {costs[name]:7.1f} ms CPU a clip   ours: "
            f"{rates['ours'] / rate:.2f} x the clips, {costs['ours'] / costs[name]:.2f} x the CPU"
        )
    if load > 1:
        print("the machine was busy: believe the CPU times, run again for the rates")
    return {
        "clips": len(clips),
        "workers": args.workers,
        "cores": multiprocessing.cpu_count(),
        "frames": args.frames,
        "size": args.size,
        "batch": args.batch,
        "load_before": load,
        "measured": {n: [dataclasses.asdict(r) for r in m] for n, m in measured.items()},
        "ratio_to_torch": rates["ours"] / rates["torch"],
        "ratio_to_torch_float": rates["ours"] / rates["torch_float"],
        "cpu_ratio_to_torch": costs["ours"] / costs["torch"],
    }


def main() -> None:
    """Parses arguments, runs, writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--manifest", help="clips to read instead of made-up ones")
    parser.add_argument("--split", help="of the manifest")
    parser.add_argument("--clips", type=int, default=8, help="made-up clips (default: 8)")
    parser.add_argument("--length", type=int, default=300, help="their frames (default: 300)")
    parser.add_argument("--frames", type=int, default=8, help="frames a clip (default: 8)")
    parser.add_argument("--size", type=int, default=224, help="side of the pictures")
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count())
    parser.add_argument("--batch", type=int, default=4, help="clips a batch (default: 4)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3, help="of all sides (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if args.manifest:
            source = sources.open_source(args.manifest, split=args.split)
            short = 2 * args.frames  # the baseline cannot take T frames of fewer
            clips = [c for i, c in enumerate(source.clips) if len(source.open(i)) >= short]
        else:
            clips = make_clips(Path(folder), args.clips, args.length)
        figures = run(clips, args)
    if args.json:
        Path(args.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
