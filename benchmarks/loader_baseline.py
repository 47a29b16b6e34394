"""A PyTorch data set that gives the rows of our loader, read with a decoder of one's choice.

For `loader.py`. The draws are ours (the same clip, frames, crop and flip for a row), so that both
sides do the same work and their batches can be compared.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence

import av
import numpy as np
from PIL import Image

from iv2_jax.data import augment, rows, sampling

READERS = ("decord", "torchcodec", "pyav")
_MEAN = np.array([0.485, 0.456, 0.406], np.float32)
_STD = np.array([0.229, 0.224, 0.225], np.float32)

# Number of frames -> which of them.
Chooser = Callable[[int], np.ndarray]


def installed() -> list[str]:
    """The decoders that can be measured here."""
    return [name for name in READERS if name == "pyav" or _loads(name)]


def _loads(name: str) -> bool:
    """Whether a package is there and finds its libraries (torchcodec needs a system FFmpeg)."""
    if importlib.util.find_spec(name) is None:
        return False
    try:
        importlib.import_module(f"{name}.decoders" if name == "torchcodec" else name)
    except (ImportError, OSError, RuntimeError) as e:
        print(f"{name} is left out, it does not load: {str(e).strip().splitlines()[0]}")
        return False
    return True


class PlainClips:
    """A map-style data set written the usual way: (T, S, S, 3) uint8 of a row."""

    def __init__(
        self,
        paths: Sequence[str],
        num_frames: int,
        size: int,
        *,
        reader: str,
        normalise: bool = False,
    ) -> None:
        """Takes the files, the shape to give, one of `READERS`, and whether to give float32."""
        self.paths = list(paths)
        self.num_frames = num_frames
        self.size = size
        self.normalise = normalise
        self._order = rows.Order(len(self.paths), 0, shuffle=True)
        self._read = {"decord": _decord, "torchcodec": _torchcodec, "pyav": _pyav}[reader]

    def __len__(self) -> int:
        """Practically endless."""
        return 1 << 30

    def __getitem__(self, item: int) -> np.ndarray:
        """(T, S, S, 3) uint8, or (3, T, S, S) float32, normalised."""
        rng = rows.row_rng(0, item)
        path = self.paths[self._order.clip(item)]
        frames = self._read(path, lambda n: sampling.pretrain(n, self.num_frames, rng))
        height, width = frames[0].shape[:2]
        x, y, w, h = augment.draw_crop(width, height, self.size, rng)
        mirrored = rng.random() < 0.5
        video = np.stack([self._crop(frame, (x, y, x + w, y + h)) for frame in frames])
        if mirrored:
            video = np.ascontiguousarray(video[:, :, ::-1])
        if not self.normalise:
            return video
        scaled = (video.astype(np.float32) / 255 - _MEAN) / _STD
        return np.ascontiguousarray(scaled.transpose(3, 0, 1, 2))

    def _crop(self, frame: np.ndarray, box: tuple[int, int, int, int]) -> np.ndarray:
        """The box, brought to the output's size."""
        cropped = Image.fromarray(frame).crop(box)
        if cropped.size == (self.size, self.size):
            return np.asarray(cropped)
        return np.asarray(cropped.resize((self.size, self.size), Image.Resampling.BILINEAR))


def _decord(path: str, choose: Chooser) -> np.ndarray:
    """decord's batch read, one thread."""
    import decord

    reader = decord.VideoReader(path, num_threads=1)
    return reader.get_batch(choose(len(reader))).asnumpy()


def _torchcodec(path: str, choose: Chooser) -> np.ndarray:
    """torchcodec's, one thread, in the mode that does not read the whole file first."""
    from torchcodec.decoders import VideoDecoder

    decoder = VideoDecoder(
        path, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode="approximate"
    )
    return decoder.get_frames_at(choose(len(decoder)).tolist()).data.numpy()


def _pyav(path: str, choose: Chooser) -> list[np.ndarray]:
    """PyAV in order up to the last wanted frame, as the released loaders read."""
    with av.open(path) as container:
        stream = container.streams.video[0]
        stream.thread_type, stream.codec_context.thread_count = "NONE", 1
        wanted = choose(stream.frames).tolist()
        found = {}
        for at, frame in enumerate(container.decode(stream)):
            if at in wanted:
                found[at] = frame.to_ndarray(format="rgb24")
            if at == wanted[-1]:
                break
    return [found[i] for i in wanted]
