"""What a frozen video encoder gives of every clip, computed once and kept in memory.

Training a bridge or a language model behind an encoder that never changes spends most of its time
in that encoder. With clips that are shown in one view only, its tokens are the same every time.
"""

from __future__ import annotations

import concurrent.futures
import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from iv2_jax.data.badclips import BadClipLog
from iv2_jax.data.decode import DecodeError
from iv2_jax.data.instruct.batches import TokenBatches, leave_out
from iv2_jax.data.instruct.pictures import views_of
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.sources import FileSource
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.models.chat import Chat
from iv2_jax.parallel.mesh import batch_sharding

logger = logging.getLogger(__name__)

Key = tuple[str, int]  # kind of the rows that show a clip, and its number


class KeptFeatures:
    """Tokens of the clips that some batches show."""

    def __init__(
        self,
        model: Chat,
        talk: TalkConfig,
        tokens: TokenBatches,
        *,
        max_bytes: float,
        threads: int = 2,
        log: str = "",
    ) -> None:
        """Takes what is shown.

        Args:
            model: the chat model, of which the encoder is used.
            talk: how views are made.
            tokens: the batches.
            max_bytes: memory for the tokens.
            threads: threads that decode.
            log: file that names clips that do not decode.

        Raises:
            ConfigError: that is too little memory.
        """
        self._model, self._talk, self._threads = model, talk, max(threads, 1)
        self._source, self._log = FileSource(tokens.clips), BadClipLog(log)
        self._shown = tokens.shown()
        self._kept: dict[Key, np.ndarray] = {}
        encoder = model.config.encoder
        self._dtype = np.dtype(jnp.dtype(encoder.precision.compute_dtype))
        needed = sum(n * math.prod(self.shape(k[0])) for k, n in self._shown.items())
        self.num_bytes = needed * self._dtype.itemsize
        if self.num_bytes > max_bytes:
            raise ConfigError(
                f"keep_features_gb: the encoder's tokens of {len(self._shown)} clips take "
                f"{self.num_bytes / 2**30:.2f} GB, {max_bytes / 2**30:.2f} are left; raise it, or "
                "set it to 0"
            )

    def shape(self, kind: str) -> tuple[int, int]:
        """Tokens of a view in rows of a kind, and their width."""
        encoder = self._model.config.encoder
        frames, height, width = encoder.grid
        return 1 + (1 if kind == "image" else frames) * height * width, encoder.width

    def fill(self, params: Any, mesh: Mesh, rows: int, max_bad_share: float) -> None:
        """Encodes every clip.

        Args:
            params: the chat model's.
            mesh: where they lie.
            rows: views that are encoded at once; a multiple of the mesh's batch shards.
            max_bad_share: largest share of clips that do not decode.

        Raises:
            DataError: there are more.
        """

        @jax.jit
        def encode(params: Any, video: jax.Array) -> jax.Array:
            pixels = self._model.config.encoder.normalize(video)
            return self._model.apply({"params": params}, pixels, method="encode")[:, 0]

        for kind in sorted({kind for kind, _ in self._shown}):
            waiting: list[tuple[Key, np.ndarray]] = []
            for key, views in self._read(kind):
                waiting += [(key, view) for view in views]
                while len(waiting) >= rows:
                    self._encode(encode, params, mesh, waiting[:rows], rows)
                    waiting = waiting[rows:]
            if waiting:
                self._encode(encode, params, mesh, waiting, rows)
        bad = len(self._shown) - len(self._kept)
        if bad > max_bad_share * len(self._shown):
            raise DataError(
                f"{bad} of {len(self._shown)} clips do not decode, more than load.max_bad_share="
                f"{max_bad_share:g} allows; load.bad_clip_log names them"
            )
        logger.info(
            "kept the encoder's tokens of %d of %d clips, %.2f GB",
            len(self._kept),
            len(self._shown),
            sum(x.nbytes for x in self._kept.values()) / 2**30,
        )

    def _read(self, kind: str) -> Iterator[tuple[Key, np.ndarray]]:
        """Views `(V, T, S, S, 3)` of every clip of a kind that decodes, a few read ahead."""
        keys = [key for key in self._shown if key[0] == kind]
        with concurrent.futures.ThreadPoolExecutor(self._threads) as pool:
            for start in range(0, len(keys), 4 * self._threads):
                part = keys[start : start + 4 * self._threads]
                for key, views in zip(part, pool.map(self._views, part), strict=True):
                    if views is not None:
                        yield key, views

    def _views(self, key: Key) -> np.ndarray | None:
        """Views of one clip, or None if it does not decode."""
        kind, number = key
        try:
            clip = self._source.open(number)
            try:
                return views_of(clip, self._talk.view_config(kind), self._talk.tiling)
            finally:
                clip.close()
        except DecodeError as e:
            self._log.add(self._source.name(number), e.reason)
            return None

    def _encode(
        self, encode: Any, params: Any, mesh: Mesh, part: Sequence[tuple[Key, Any]], rows: int
    ) -> None:
        """Encodes up to `rows` views and keeps what they give."""
        video = np.stack([view for _, view in part] + [part[0][1]] * (rows - len(part)))
        made = np.asarray(encode(params, jax.device_put(video, batch_sharding(mesh))))
        for (key, _), tokens in zip(part, made, strict=False):
            before = self._kept.get(key, np.zeros((0, *self.shape(key[0])), self._dtype))
            self._kept[key] = np.concatenate([before, tokens[None].astype(self._dtype)])

    def add(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of `TalkLoader` with `features` (b, V, M, C), and without clips not decoded."""
        if "clips" not in batch:
            return batch
        kind = batch["media"].partition("-")[0]
        clips, views = batch["clips"], batch["view"]
        features = np.zeros((*clips.shape, *self.shape(kind)), self._dtype)
        bad = set()
        for place in zip(*np.nonzero(clips >= 0), strict=True):
            kept = self._kept.get((kind, int(clips[place])))
            if kept is None:
                bad.add(int(clips[place]))
            else:
                features[place] = kept[views[place]]
        unread = leave_out(batch | {"media": clips}, bad)
        return batch | {"features": features, "unread": batch["unread"] + unread}
