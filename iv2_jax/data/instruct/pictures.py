"""Pixels of the views that a batch of token sequences asks for.

Adds `video`, `(b, V, T, S, S, 3)`: uint8, or float32 in the units of pixels with tiles, whose
resizing is not clamped (spec stage3 3.1). Zeros where there is no view. Nothing is mirrored but
with `released_flip`, as the original does although answers say left and right (trap 21). Adds
`unread`, int32 `(b,)`, conversations of each row that left the loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iv2_jax.data.badclips import BadClipLog
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.instruct.batches import leave_out
from iv2_jax.data.records import Clip
from iv2_jax.data.rows import load_views, sampling_rule
from iv2_jax.data.sources import FileSource, Frames
from iv2_jax.data.tiles import TilingConfig, hd_views
from iv2_jax.errors import ConfigError, DataError

KINDS = ("image", "video")


class ViewLoader:
    """Loads the pixels of batches; the draws follow from (seed, epoch, conversation, file).

    Attributes:
      unread: conversations so far that left the loss because a file did not decode.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        data: Mapping[str, DataConfig],
        *,
        seed: int,
        tiling: TilingConfig | None = None,
        log: str = "",
    ) -> None:
        """Takes what to load.

        Args:
          clips: `TokenBatches.clips`.
          data: how batches of `image` and `video` are sampled and augmented; one view each.
          seed: of every draw.
          tiling: cuts what is sampled into tiles and a global view, with no augmentation.
          log: file that names what does not decode, see `DataConfig.bad_clip_log`.

        Raises:
          ConfigError: a setting does not fit.
        """
        for kind, config in data.items():
            if kind not in KINDS or config.media != kind:
                raise ConfigError(
                    f"data[{kind!r}].media is {config.media!r}: image and video are loaded here, "
                    "each under its own name"
                )
            if config.num_views != 1:
                raise ConfigError(f"data[{kind!r}].views and crops must be 1, tiles are views here")
        self._data, self._seed, self._tiling = dict(data), seed, tiling
        self._source = FileSource(clips)
        self._log = BadClipLog(log)
        self.unread = 0

    def add(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with `video` and `unread`; as it is where there is text alone.

        Conversations about files that do not decode are taken out of the loss, logged and counted.

        Raises:
          ConfigError: there are no settings for the batch's kind.
          DataError: a file has another number of views than was planned for it.
        """
        kind = batch["kind"]
        if "media" not in batch:
            return batch
        if kind not in self._data:
            raise ConfigError(f"data has no settings for {kind!r}, which conversations show")
        config = self._data[kind]
        size = self._tiling.tile_size if self._tiling else config.size
        shape = (*batch["media"].shape, config.frames, size, size, 3)
        video = np.zeros(shape, np.float32 if self._tiling else np.uint8)
        bad: set[int] = set()
        for row, media in enumerate(batch["media"]):
            for number in np.unique(media[media >= 0]).tolist():
                for segment in np.unique(batch["view_segment"][row][media == number]).tolist():
                    places = (media == number) & (batch["view_segment"][row] == segment)
                    key = (batch["epoch"], int(batch["index"][row, segment - 1]), number)
                    pixels = None if number in bad else self._load(number, key, config)
                    if pixels is None:
                        bad.add(number)
                        continue
                    chosen = batch["view"][row][places]
                    planned = int(chosen.max()) + 1
                    if planned != len(pixels):
                        raise DataError(
                            f"{self._source.name(number)} has {len(pixels)} views, "
                            f"{planned} were planned: num_views must go by its real size"
                        )
                    video[row, places] = pixels[chosen]
        batch = batch | {"targets": batch["targets"].copy()} if bad else batch
        unread = leave_out(batch, bad)
        self.unread += int(unread.sum())
        return batch | {"video": video, "unread": unread}

    def _load(self, number: int, key: tuple[int, ...], config: DataConfig) -> np.ndarray | None:
        """All views of a file `(V, T, S, S, 3)`, or None if it does not decode."""
        rng = np.random.default_rng(np.random.SeedSequence(self._seed, spawn_key=(9, *key)))
        try:
            clip = self._source.open(number)
            try:
                return views_of(clip, config, self._tiling, rng)
            finally:
                clip.close()
        except DecodeError as e:
            self._log.add(self._source.name(number), e.reason)
            return None


def views_of(
    clip: Frames,
    config: DataConfig,
    tiling: TilingConfig | None = None,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """The views of an open clip that the video encoder sees, each on its own.

    Args:
      clip: of `sources.open_frames`.
      config: how frames are picked and cropped, see `TalkConfig.view_config`.
      tiling: cuts what is picked into tiles and a global view, with no augmentation.
      rng: source of the draws of training.

    Returns:
      `(V, T, S, S, 3)`, uint8, or float32 with tiles.

    Raises:
      DecodeError: frames cannot be read.
    """
    if tiling is None:
        # Answers may say left and right.
        return load_views(clip, config, rng, flip=config.flip and config.released_flip)
    train, evaluate = sampling_rule(clip, config)
    if config.eval or config.fixed_view:
        chosen = evaluate(len(clip), config.frames, 0, 1)
    else:
        chosen = train(len(clip), config.frames, rng)
    return hd_views(clip.read(chosen), tiling)


def data_of(video: DataConfig) -> dict[str, DataConfig]:
    """Settings for both kinds from those for videos: images are one frame, the rest alike."""
    image = dataclasses.replace(video, media="image", num_frames=1)
    return {"image": image, "video": video}
