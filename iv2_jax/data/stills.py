"""Pictures: one alone as a clip of one frame, or a folder of them as the frames of a clip."""

from __future__ import annotations

import functools
import io
import os
import re
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageOps

from iv2_jax.data.decode import DecodeError

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
_HIGH_BITS = 8  # of a 16-bit grey level that are dropped

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


class Still:
    """A picture as a clip of one frame."""

    def __init__(self, source: str | bytes, *, name: str = "", crop: Box | None = None) -> None:
        """Takes a path or the bytes of a file, and the part of the picture that counts."""
        self.path = name or (source if isinstance(source, str) else "<bytes>")
        self.warnings: list[str] = []
        self._source, self._crop = source, crop

    def __len__(self) -> int:
        return 1

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `sources.Frames.read`; the only index is 0."""
        if np.any(np.asarray(indices) != 0):
            raise IndexError(f"{self.path}: frames {list(indices)} of a picture are asked for")
        picture = load_picture(self._source, name=self.path)
        if self._crop is not None:
            picture = self._cropped(picture, self._crop)
        return np.repeat(picture[None], len(indices), axis=0)

    def _cropped(self, picture: np.ndarray, crop: Box) -> np.ndarray:
        """The part within the box, at least a pixel."""
        height, width = picture.shape[:2]
        x0, y0, x1, y1 = (round(side) for side in crop)
        part = picture[max(y0, 0) : y1, max(x0, 0) : x1]
        if not part.size:
            raise DecodeError(
                self.path, f"its crop {list(crop)} lies outside of {width}x{height} pixels"
            )
        return part

    def close(self) -> None:
        """Nothing is open between reads."""


class FrameFolder:
    """A clip stored as one picture a frame, in the order of the numbers in their names."""

    def __init__(self, path: str, frames: int | None = None) -> None:
        """Lists the pictures; the first `frames` of them if given."""
        self.path = path
        self.warnings: list[str] = []
        self._files = list(_pictures(path))
        if not self._files:
            raise DecodeError(path, f"holds no pictures ({', '.join(EXTENSIONS)})")
        if frames is not None and frames > len(self._files):
            raise DecodeError(path, f"holds {len(self._files)} pictures, the list says {frames}")
        self._files = self._files[:frames]

    def __len__(self) -> int:
        return len(self._files)

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """See `sources.Frames.read`; pictures of other sizes are brought to that of the first."""
        chosen = np.asarray(indices, np.int64)
        if chosen.min() < 0 or chosen.max() >= len(self._files):
            raise IndexError(f"{self.path}: frames {chosen.min()}..{chosen.max()} are asked for")
        loaded: dict[int, np.ndarray] = {}
        size: tuple[int, int] | None = None
        for i in np.unique(chosen).tolist():
            loaded[i] = load_picture(os.path.join(self.path, self._files[i]), size=size)
            size = size or (loaded[i].shape[1], loaded[i].shape[0])
        return np.stack([loaded[i] for i in chosen.tolist()])

    def close(self) -> None:
        """Nothing is open between reads."""


def _pictures(folder: str) -> Iterator[str]:
    """Picture files of a folder, `img_2` before `img_10`."""
    names = [n for n in os.listdir(folder) if n.lower().endswith(EXTENSIONS)]
    yield from sorted(names, key=_natural)


@functools.lru_cache(maxsize=4096)
def _natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """Sort key that compares runs of digits as numbers."""
    parts = re.findall(r"\d+|\D+", name)
    return tuple((0, int(p)) if p.isdigit() else (1, p) for p in parts)


def load_picture(
    source: str | bytes, *, name: str = "", size: tuple[int, int] | None = None
) -> np.ndarray:
    """Decodes one picture, upright as its EXIF orientation says.

    Args:
      source: path, or the bytes of a file.
      name: what messages call it; the path by default.
      size: (width, height) to bring it to; its own by default.

    Returns:
      (H, W, 3) uint8 RGB; transparency is dropped, 16-bit grey keeps its upper 8 bits.

    Raises:
      DecodeError: it is no readable picture.
    """
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            image.load()
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):
                grey = np.clip(np.asarray(upright, np.int64) >> _HIGH_BITS, 0, 255)
                upright = Image.fromarray(grey.astype(np.uint8))
            picture = upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        shown = name or (source if isinstance(source, str) else "<bytes>")
        raise DecodeError(shown, f"is not a readable picture: {e}") from e
    return np.asarray(picture if size in (None, picture.size) else picture.resize(size))
