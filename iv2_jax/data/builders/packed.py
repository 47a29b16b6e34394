"""Packs the clips of a manifest into ArrayRecord files that TFDS and our loader read at random.

The folder is a complete TFDS data set (`dataset_info.json`, `features.json`, shards of serialised
`tf.train.Example`): `tfds.builder_from_directory(folder).as_data_source()` reads it without
TensorFlow. One more file, `iv2_clips.jsonl`, repeats the records without the video bytes, so that
our loader can list a large set without reading it.

Clips are stored as the bytes of their files, be it videos, pictures or sound; a sound file of its
own goes beside them. Videos with `start` or `end` are cut, which means encoding them anew;
`short_side` and `gop` ask for that of every video. Sound files that are cut become WAV. With
`frames` a video is stored as some of its frames, JPEG pictures, and its sound beside them as FLAC.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from iv2_jax.data import stills
from iv2_jax.data.builders import encode
from iv2_jax.data.builders.frames import FrameOptions, Stored, sound_track, store_frames
from iv2_jax.data.builders.shards import Shards, new_folder
from iv2_jax.data.decode import DecodeError, VideoReader
from iv2_jax.data.records import Clip
from iv2_jax.data.sources import PACKED_INDEX, SOUND_FILES, FileSource, read_bytes
from iv2_jax.data.stills import Still
from iv2_jax.errors import DataError

VERSION = "1.0.0"
_DEFAULT_SPLIT = "train"  # of clips that name none
_DESCRIPTION = (
    "Clips packed by iv2_jax: `video` holds the bytes of one video, picture or sound file, `sound` "
    "those of a sound file that belongs to it."
)


@dataclasses.dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes:
      name: name of the data set, part of the file names.
      shard_bytes: a shard is closed when it has grown beyond this.
      short_side: encode anew with the short side brought down to this; None leaves sizes alone.
      gop: encode anew with a keyframe every so many frames; None leaves files alone.
      frames: store sampled frames in the place of videos; None stores videos.
      keep_audio: keep the sound of clips that are encoded anew.
      max_bad_share: share of clips that may fail to decode and be left out.
      overwrite: replace the folder if it exists.
    """

    name: str = "clips"
    shard_bytes: int = 256 << 20
    short_side: int | None = None
    gop: int | None = None
    frames: FrameOptions | None = None
    keep_audio: bool = True
    max_bad_share: float = 0.1
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise DataError(f"name {self.name!r} must be lower-case letters, digits and _")
        for field, least in (("shard_bytes", 1), ("short_side", 16), ("gop", 1)):
            value = getattr(self, field)
            if value is not None and value < least:
                raise DataError(f"{field} must be at least {least}, is {value}")
        if self.frames and (self.gop or self.short_side):
            raise DataError("frames are no video: gop and short_side do not go with them")


@dataclasses.dataclass(frozen=True)
class PackReport:
    """What was packed: clips, bytes, shards by split, and what was left out with the reason.

    `left_out` are clips, `sounds_left_out` sound files of clips that were packed without them.
    """

    clips: int
    bytes: int
    shards: dict[str, int]
    left_out: list[tuple[str, str]]
    sounds_left_out: list[tuple[str, str]] = dataclasses.field(default_factory=list)


def build(
    clips: Sequence[Clip],
    folder: str | os.PathLike[str],
    options: PackOptions | None = None,
    *,
    progress: Callable[[], None] | None = None,
) -> PackReport:
    """Packs clips into a new folder; nothing is left behind if it fails.

    Args:
      clips: what to pack, in the order of the set.
      folder: the folder to make.
      options: how.
      progress: called after every clip.

    Returns:
      What was packed.

    Raises:
      DataError: the folder exists or cannot be written, the disk is full, or too many clips do
        not decode.
    """
    options = options or PackOptions()
    with new_folder(folder, overwrite=options.overwrite) as temporary:
        report = _Builder(clips, temporary, options).run(progress or (lambda: None))
    return report


class _Builder:
    """One run of `build`, writing into a folder that does not count yet."""

    def __init__(self, clips: Sequence[Clip], folder: Path, options: PackOptions) -> None:
        """Takes the clips, an empty folder, and how to pack."""
        from tensorflow_datasets.core import example_serializer

        self._source = FileSource(clips)
        self._folder = folder
        self._options = options
        self._features = features()
        self._serializer = example_serializer.ExampleSerializer(
            self._features.get_serialized_info()
        )
        self._left_out: list[tuple[str, str]] = []
        self._sounds_left_out: list[tuple[str, str]] = []
        self._bytes = 0

    def run(self, progress: Callable[[], None]) -> PackReport:
        """Writes shards, index and TFDS's own files."""
        splits: dict[str, list[int]] = {}
        for i, clip in enumerate(self._source.clips):
            splits.setdefault(_split_name(clip), []).append(i)
        lengths: dict[str, list[int]] = {}
        packed = 0
        with (self._folder / PACKED_INDEX).open("w", encoding="utf-8") as index:
            for split in sorted(splits):
                shards = Shards(self._folder, self._options.name, split, self._options.shard_bytes)
                with contextlib.closing(shards):
                    for i in splits[split]:
                        record = self._pack(i)
                        progress()
                        if record is None:
                            continue
                        shards.write(record)
                        line = {**self._source.clips[i].to_json(), "shard_split": split}
                        index.write(json.dumps(line, ensure_ascii=False) + "\n")
                        packed += 1
                if shards.lengths:
                    lengths[split] = shards.finish()
        if not packed:
            raise DataError(f"none of the {len(self._source)} clips decodes; {self._worst()}")
        self._write_tfds(lengths)
        return PackReport(
            packed,
            self._bytes,
            {s: len(n) for s, n in lengths.items()},
            self._left_out,
            self._sounds_left_out,
        )

    def _pack(self, index: int) -> bytes | None:
        """The serialised example of one clip, or None when it does not decode."""
        clip = self._source.clips[index]
        video, stored = b"", None
        try:
            if self._options.frames and _is_video(clip):
                stored = store_frames(clip, self._options.frames)
            else:
                video = self._file(clip)
        except DecodeError as e:
            self._left_out.append((clip.path, e.reason))
            allowed = self._options.max_bad_share * max(len(self._source), 1)
            if len(self._left_out) > allowed:
                raise DataError(
                    f"{len(self._left_out)} of {len(self._source)} clips do not decode, more than "
                    f"max_bad_share={self._options.max_bad_share:g} allows; {self._worst()}"
                ) from e
            return None
        sound = self._sound(clip, track=stored is not None)
        self._bytes += len(video) + len(sound) + sum(map(len, stored.pictures if stored else ()))
        example = self._features.encode_example(_example(clip, video, sound, stored))
        return self._serializer.serialize_example(example)

    def _worst(self) -> str:
        """The first clips left out, for a message."""
        return "; ".join(f"{path}: {reason}" for path, reason in self._left_out[:3])

    def _file(self, clip: Clip) -> bytes:
        """The bytes to store; decodes at least the beginning of what is stored."""
        if not clip.path:
            return b""
        if os.path.isdir(clip.path):
            return self._video(clip)
        if clip.path.lower().endswith(stills.EXTENSIONS):
            data = read_bytes(clip.path)
            Still(data, name=clip.path, crop=clip.crop).read([0])
            return data
        if clip.path.lower().endswith(SOUND_FILES):
            return encode.sound_file(clip.path, clip.start, clip.end)
        return self._video(clip)

    def _sound(self, clip: Clip, *, track: bool) -> bytes:
        """The bytes of the clip's sound file, or of its `track`; nothing when none decodes."""
        try:
            if clip.sound is not None:
                return encode.sound_file(clip.sound, None, None)
            if track and self._options.keep_audio and not os.path.isdir(clip.path):
                return sound_track(clip)
        except DecodeError as e:
            self._sounds_left_out.append((clip.sound or clip.path, e.reason))
        return b""

    def _video(self, clip: Clip) -> bytes:
        """The bytes of a video to store."""
        options = self._options
        cut = clip.start is not None or clip.end is not None
        if cut or options.short_side or options.gop or os.path.isdir(clip.path):
            return encode.encode_clip(
                clip,
                short_side=options.short_side,
                gop=options.gop or encode.DEFAULT_GOP,
                keep_audio=options.keep_audio,
            )
        video = read_bytes(clip.path)
        with VideoReader(video, name=clip.path) as reader:
            reader.read([0])
        return video

    def _write_tfds(self, lengths: dict[str, list[int]]) -> None:
        """`dataset_info.json` and `features.json`."""
        import tensorflow_datasets as tfds

        template = {"data_dir": self._folder, "dataset_name": self._options.name}
        infos = [
            tfds.core.SplitInfo(
                name=split,
                shard_lengths=counts,
                num_bytes=sum(p.stat().st_size for p in self._folder.glob(f"*-{split}.array*")),
                filename_template=tfds.core.ShardedFileTemplate(
                    split=split, filetype_suffix="array_record", **template
                ),
            )
            for split, counts in lengths.items()
        ]
        tfds.folder_dataset.write_metadata(
            data_dir=self._folder,
            features=self._features,
            split_infos=infos,
            version=VERSION,
            filename_template=tfds.core.ShardedFileTemplate(
                filetype_suffix="array_record", **template
            ),
            description=_DESCRIPTION,
            check_data=False,  # that check reads through TensorFlow
        )


def features() -> Any:
    """The `tfds.features.FeaturesDict` of a packed set."""
    import numpy as np
    import tensorflow_datasets as tfds

    text = tfds.features.Text
    return tfds.features.FeaturesDict(
        {
            "id": text(),
            "path": text(),
            "video": tfds.features.Tensor(shape=(), dtype=np.object_),
            "start": np.float32,  # of the original; NaN: its beginning
            "end": np.float32,  # NaN: its end
            "captions": tfds.features.Sequence({"modality": text(), "text": text()}),
            "labels": tfds.features.Sequence(
                {"name": text(), "value": text(), "is_number": np.int64}
            ),
            "qa": tfds.features.Sequence({"question": text(), "answer": text()}),
            "split": text(),
            "group": text(),
            "audio": np.int64,  # -1: not known
            "sound": tfds.features.Tensor(shape=(), dtype=np.object_),  # empty: none of its own
            "sound_path": text(),
            "frames": tfds.features.Sequence(text()),  # JPEG files, where no video is stored
            "seconds": tfds.features.Sequence(np.float32),  # when each is shown
            "crop": tfds.features.Sequence(np.float32),  # x0, y0, x1, y1, or nothing
            "options": tfds.features.Sequence(text()),
            "answers": tfds.features.Sequence(np.int64),
        }
    )


def _is_video(clip: Clip) -> bool:
    """Whether a clip has frames, more than one picture."""
    return bool(clip.path) and (
        os.path.isdir(clip.path)
        or not clip.path.lower().endswith((*stills.EXTENSIONS, *SOUND_FILES))
    )


def _example(clip: Clip, video: bytes, sound: bytes, stored: Stored | None) -> dict[str, Any]:
    """A clip as the features have it."""
    return {
        "id": clip.id,
        "path": clip.path,
        "video": video,
        "start": math.nan if clip.start is None else clip.start,
        "end": math.nan if clip.end is None else clip.end,
        "captions": [
            {"modality": name, "text": text} for name, all in clip.captions.items() for text in all
        ],
        "labels": [
            {"name": name, "value": str(value), "is_number": int(isinstance(value, int))}
            for name, value in clip.labels.items()
        ],
        "qa": [{"question": q, "answer": a} for q, a in clip.qa],
        "split": clip.split or "",
        "group": clip.group or "",
        "audio": -1 if clip.audio is None else int(clip.audio),
        "sound": sound,
        "sound_path": clip.sound or "",
        "frames": stored.pictures if stored else [],
        "seconds": stored.seconds if stored else [],
        "crop": list(clip.crop or ()),
        "options": list(clip.options),
        "answers": list(clip.answers),
    }


def _split_name(clip: Clip) -> str:
    """The split whose shards hold the clip."""
    name = clip.split or _DEFAULT_SPLIT
    if not re.fullmatch(r"\w+", name):
        raise DataError(
            f"clip {clip.id!r}: split {name!r} cannot name files; use letters, digits and _"
        )
    return name
