"""What a packed data set is on disk: shards by split, and serialised examples in them."""

from __future__ import annotations

import math
import os
import re
from typing import Any

from iv2_jax.data.records import Clip
from iv2_jax.errors import DataError

PACKED_INDEX = "iv2_clips.jsonl"  # records of a packed set in the order of its shards


def packed_shards(folder: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Files of every split of a TFDS folder, in order.

    Raises:
      DataError: the folder holds no complete set of ArrayRecord shards.
    """
    pattern = re.compile(r".+-(?P<split>[^-]+)\.array_record-(?P<at>\d{5})-of-(?P<of>\d{5})")
    found: dict[str, dict[int, str]] = {}
    expected: dict[str, int] = {}
    for name in sorted(os.listdir(folder)):
        match = pattern.fullmatch(name)
        if match:
            split = match["split"]
            found.setdefault(split, {})[int(match["at"])] = os.path.join(folder, name)
            expected[split] = int(match["of"])
    if not found:
        raise DataError(
            f"{folder}: holds no *.array_record-* files; give a manifest or the folder that "
            "`iv2 data build` wrote"
        )
    for split, files in found.items():
        missing = sorted(set(range(expected[split])) - set(files))
        if missing:
            raise DataError(f"{folder}: split {split!r} lacks shard {missing[0]}; copy it again")
    return {split: [files[i] for i in sorted(files)] for split, files in found.items()}


def parse_example(record: bytes) -> dict[str, list[Any]]:
    """Values of a serialised `tf.train.Example` by feature, without TensorFlow."""
    from tensorflow_datasets.proto import tf_example_pb2

    example = tf_example_pb2.Example.FromString(record)
    values: dict[str, list[Any]] = {}
    for key, feature in example.features.feature.items():
        kind = feature.WhichOneof("kind")
        values[key] = list(getattr(feature, kind).value) if kind else []
    return values


def example_clip(values: dict[str, list[Any]]) -> Clip:
    """The record of an example written by `builders.packed`."""

    def texts(key: str) -> list[str]:
        return [value.decode() for value in values.get(key, [])]

    def optional(key: str) -> str | None:
        return next(iter(texts(key)), "") or None

    def seconds(key: str) -> float | None:
        value = next(iter(values.get(key, [])), math.nan)
        return None if math.isnan(value) else float(value)

    captions: dict[str, tuple[str, ...]] = {}
    for modality, text in zip(texts("captions/modality"), texts("captions/text"), strict=True):
        captions[modality] = (*captions.get(modality, ()), text)
    numbers = values.get("labels/is_number", [])
    named = zip(texts("labels/name"), texts("labels/value"), numbers, strict=True)
    audio = next(iter(values.get("audio", [])), -1)
    return Clip(
        id=optional("id") or "",
        path=optional("path") or "",
        start=seconds("start"),
        end=seconds("end"),
        captions=captions,
        labels={name: int(value) if number else value for name, value, number in named},
        qa=tuple(zip(texts("qa/question"), texts("qa/answer"), strict=True)),
        split=optional("split"),
        group=optional("group"),
        audio=None if audio < 0 else bool(audio),
        sound=optional("sound_path"),
        crop=tuple(values.get("crop", [])) or None,
        options=tuple(texts("options")),
        answers=tuple(int(n) for n in values.get("answers", [])),
    )
