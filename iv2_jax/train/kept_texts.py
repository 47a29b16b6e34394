"""Features of captions by a frozen text tower, computed once for each caption and kept.

For runs that contrast media with captions of a set small enough to be shown many times: there the
frozen tower, not what is trained, may take most of a step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import jax
import numpy as np

from iv2_jax.models.text.bert import Bert, BertConfig

PREFIX = "kept_text_"  # of the arrays that are added to a batch, by caption


class KeptTexts:
    """Adds the first token's features to batches; what was computed is kept for the process."""

    def __init__(self, config: BertConfig, params: Any, pad_id: int) -> None:
        """Takes the tower's config, its parameters (host arrays) and the id of padding."""
        self._bert, self._params, self._pad_id = Bert(config), params, pad_id
        self._kept: dict[bytes, np.ndarray] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def stream(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The batches with `kept_text_<caption>` (B, D) beside each `text_<caption>` (B, L).

        Args:
            batches: of a loader, which is closed at the end.
        """
        with contextlib.closing(batches):
            for batch in batches:
                names = [name for name in batch if name.startswith("text_")]
                yield batch | {
                    PREFIX + name.removeprefix("text_"): self.features(batch[name])
                    for name in names
                }

    def features(self, ids: np.ndarray) -> np.ndarray:
        """Features (B, D) of token ids (B, L)."""
        ids = np.ascontiguousarray(ids, np.int32)
        keys = [row.tobytes() for row in ids]
        if any(key not in self._kept for key in keys):
            # All rows, not the new ones alone: one shape, so one program.
            rows = np.asarray(_first_token(self._bert, self._params, ids, self._pad_id))
            self._kept.update(zip(keys, rows, strict=True))
        return np.stack([self._kept[key] for key in keys])


@partial(jax.jit, static_argnums=(0, 3))
def _first_token(bert: Bert, params: Any, ids: jax.Array, pad_id: int) -> jax.Array:
    mask = (ids != pad_id).astype("int32")
    return bert.apply({"params": params}, ids, mask, method=Bert.encode_text)[:, 0]
