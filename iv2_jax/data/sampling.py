"""Which frames of a clip are taken: the rules of the released code as functions of counts.

Every function returns (T,) int64 indices into the n frames of a clip; add the clip's first frame
for indices into the file. Random rules take a `numpy.random.Generator`. Rules and check values:
spec stage1 7.2. The rules of stage 2 are in `sampling_stage2`; `rule` knows all by name.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable

import numpy as np

from iv2_jax.data.sampling_stage2 import at_fixed_rate, check_counts, middle, spread_random
from iv2_jax.errors import ConfigError, nearest

# -- pretraining -----------------------------------------------------------------------------------


def pretrain_window(num_available: int, num_frames: int, length: int, stride: int) -> int:
    """Number of places a segment's first frame is drawn from; 0 when the clip is too short."""
    return max(num_available - length * stride + 1, 0) // num_frames


def pretrain(
    num_available: int,
    num_frames: int,
    rng: np.random.Generator,
    *,
    length: int = 1,
    stride: int = 1,
) -> np.ndarray:
    """One random frame from each of T equal segments; frame 0 throughout when n < T.

    Args:
      num_available: n, frames of the clip.
      num_frames: number of segments.
      rng: source of the draws.
      length: frames taken from each segment.
      stride: distance of those frames.

    Returns:
      (num_frames * length,) indices.
    """
    check_counts(num_available, num_frames)
    window = pretrain_window(num_available, num_frames, length, stride)
    if window > 0:
        firsts = np.arange(num_frames) * window + rng.integers(window, size=num_frames)
    else:
        firsts = np.zeros(num_frames, np.int64)
    return expand_segments(firsts, num_available, length, stride)


def expand_segments(firsts: np.ndarray, num_available: int, length: int, stride: int) -> np.ndarray:
    """The frames of every segment, from its first one on, held at the last frame there is."""
    steps = np.asarray(firsts, np.int64)[:, None] + np.arange(length) * stride
    return np.minimum(steps, num_available - 1).reshape(-1)


def released_minus_one(indices: np.ndarray, num_available: int) -> np.ndarray:
    """What the released pretraining loader reads: one frame earlier, -1 being the last frame.

    A 1-based convention that its file list had lost (spec stage1 trap 12). For reproduction only.
    """
    shifted = np.asarray(indices, np.int64) - 1
    return np.where(shifted < 0, num_available - 1, shifted)


# -- segments (Kinetics_sparse: K400/600/700/710, MiT, ANet, HACS) --------------------------------


def segment_ranges(num_available: int, num_frames: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last index (included) from which each of the T training frames is drawn."""
    check_counts(num_available, num_frames)
    segment = max(0.0, (num_available - 1) / num_frames)
    edges = np.round(segment * np.arange(num_frames + 1)).astype(np.int64)
    return edges[:-1], edges[1:]


def segments_train(num_available: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """One random frame from each of T segments whose edges overlap by one frame."""
    low, high = segment_ranges(num_available, num_frames)
    return np.minimum(rng.integers(low, high, endpoint=True), num_available - 1)


def segments_eval(
    num_available: int, num_frames: int, view: int = 0, num_views: int = 1
) -> np.ndarray:
    """The frames of temporal view `view` of `num_views`; one view takes the middle."""
    check_counts(num_available, num_frames)
    segment = max(0.0, (num_available - 1) / num_frames)
    starts = np.round(segment * np.arange(num_frames)).astype(np.int64)
    return np.minimum(starts + int(segment / (num_views + 1) * (view + 1)), num_available - 1)


# -- dense (Kinetics, UCF101) ---------------------------------------------------------------------


def dense_train(
    num_available: int, num_frames: int, rng: np.random.Generator, *, stride: int = 4
) -> np.ndarray:
    """T frames of one random stretch of T * stride frames."""
    check_counts(num_available, num_frames)
    span = num_frames * stride
    if num_available <= span:
        return _dense_short(num_available, num_frames, stride)
    return _dense_at(int(rng.integers(span, num_available)), num_frames, span)


def dense_validation(
    num_available: int, num_frames: int, *, stride: int = 4, released: bool = False
) -> np.ndarray:
    """T frames of the middle stretch.

    Args:
      num_available: n.
      num_frames: T.
      stride: mean distance of the frames.
      released: the released code's stretch, which lies half its length too early and gives
        negative indices for clips that are little longer than it.
    """
    check_counts(num_available, num_frames)
    span = num_frames * stride
    if num_available <= span:
        return _dense_short(num_available, num_frames, stride)
    end = (num_available - span) // 2
    return _dense_at(end if released else end + span, num_frames, span)


def dense_test(
    num_available: int, num_frames: int, view: int = 0, num_views: int = 1, *, stride: int = 4
) -> np.ndarray:
    """Temporal view `view` of `num_views` evenly spread stretches; one view takes the middle."""
    check_counts(num_available, num_frames)
    span = num_frames * stride
    room = max(num_available - span, 0)
    start = int(view * (room / (num_views - 1))) if num_views > 1 else room // 2
    taken = np.arange(start, min(start + span, num_available), stride)
    return np.concatenate([taken, np.full(num_frames - len(taken), taken[-1])])


def _dense_short(num_available: int, num_frames: int, stride: int) -> np.ndarray:
    """A clip that is no longer than the stretch: all of it, then its last frame again."""
    points = num_available // stride
    spread = np.linspace(0, num_available, num=points)
    padded = np.concatenate([spread, np.full(num_frames - points, num_available)])
    return np.clip(padded, 0, num_available - 1).astype(np.int64)


def _dense_at(end: int, num_frames: int, span: int) -> np.ndarray:
    """T points over the `span` frames before `end`, truncated to whole frames."""
    start = end - span
    return np.clip(np.linspace(start, end, num=num_frames), start, end - 1).astype(np.int64)


# -- SSv2 and HMDB51 ------------------------------------------------------------------------------


def frames_train(num_available: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Folders of frames: one random frame a segment; short clips are padded at their beginning."""
    check_counts(num_available, num_frames)
    segment = num_available // num_frames
    if segment == 0:
        missing = num_frames - num_available
        return np.concatenate([np.zeros(missing, np.int64), np.arange(num_available)])
    return np.arange(num_frames) * segment + rng.integers(segment, size=num_frames)


def frames_validation(num_available: int, num_frames: int) -> np.ndarray:
    """Folders of frames: the middle of each segment."""
    check_counts(num_available, num_frames)
    segment = num_available // num_frames
    if segment == 0:
        missing = num_frames - num_available
        return np.concatenate([np.zeros(missing, np.int64), np.arange(num_available)])
    return np.arange(num_frames) * segment + segment // 2


def frames_test(
    num_available: int, num_frames: int, view: int = 0, num_views: int = 1, *, hmdb: bool = False
) -> np.ndarray:
    """Folders of frames: temporal view `view` of `num_views` interleaved ones.

    Args:
      num_available: n.
      num_frames: T.
      view: which view.
      num_views: how many.
      hmdb: HMDB51's rule, which leaves the last frame out of the division.
    """
    check_counts(num_available, num_frames)
    tick = (num_available - 1 if hmdb else num_available) / num_frames
    shifts = np.arange(num_views)[:, None] * tick / num_views
    every = np.sort((shifts + tick * np.arange(num_frames)).astype(np.int64).reshape(-1))
    return every[view::num_views]


def video_train(num_available: int, num_frames: int, rng: np.random.Generator) -> np.ndarray:
    """Video files: one random frame a segment; frame 0 throughout when n < T."""
    check_counts(num_available, num_frames)
    segment = num_available // num_frames
    if segment == 0:
        return np.zeros(num_frames, np.int64)
    return np.arange(num_frames) * segment + rng.integers(segment, size=num_frames)


def video_validation(num_available: int, num_frames: int) -> np.ndarray:
    """Video files: the middle of each of T equal stretches of time."""
    check_counts(num_available, num_frames)
    tick = num_available / num_frames
    return (tick / 2 + tick * np.arange(num_frames)).astype(np.int64)


def video_test(num_available: int, num_frames: int, view: int) -> np.ndarray:
    """Video files: view 0 or 1; the rule knows two views only."""
    if view not in (0, 1):
        raise ValueError(f"view {view}: this rule has views 0 and 1")
    starts = (num_available / num_frames * np.arange(num_frames)).astype(np.int64)
    return np.sort(np.concatenate([video_validation(num_available, num_frames), starts]))[view::2]


# -- stretches of files ---------------------------------------------------------------------------


def frame_range(
    start: int,
    end: int,
    num_frames: int,
    *,
    fps: float = 0.0,
    num_available: int | None = None,
    released: bool = False,
) -> np.ndarray:
    """T frames of the stretch that `video_start_frame` and `video_end_frame` of a record name.

    Args:
      start: first frame of the stretch in the file.
      end: its last frame.
      num_frames: T.
      fps: frames per second; for `released`.
      num_available: frames of the file, beyond which its last one stands in; None for no end.
      released: what `read_clip_from_video` reads: the times wanted are cut to whole seconds and
        counted from the beginning of the file, but frames before `start` are passed over, so that
        mostly the stretch's first T frames come out.

    Returns:
      (T,) frame numbers in the file.

    Raises:
      ValueError: the stretch is empty, or `released` is without `fps`.
    """
    if start < 0 or end < start:
        raise ValueError(f"frames {start} to {end}: the stretch has no frame")
    offsets = segments_eval(end - start + 1, num_frames)
    if not released:
        chosen = start + offsets
    else:
        if fps <= 0:
            raise ValueError(f"fps {fps}: the released rule needs the clip's frames per second")
        earliest = np.ceil(np.floor(offsets / fps) * fps - 1e-9).astype(np.int64)
        chosen = np.empty(num_frames, np.int64)
        at = start
        for i, wanted in enumerate(earliest.tolist()):
            chosen[i] = max(at, wanted)
            at = int(chosen[i]) + 1
    return chosen if num_available is None else np.minimum(chosen, num_available - 1)


def all_frames(num_available: int, num_frames: int, *_: object) -> np.ndarray:
    """Every frame of a clip that was stored as so many: a rule for training and evaluation."""
    if num_available != num_frames:
        raise ValueError(f"{num_available} frames are not {num_frames}")
    return np.arange(num_frames)


# -- by name --------------------------------------------------------------------------------------

Train = Callable[[int, int, np.random.Generator], np.ndarray]
Eval = Callable[[int, int, int, int], np.ndarray]


def _or_single(single: Callable[[int, int], np.ndarray], several: Eval) -> Eval:
    """Validation's rule for one view, test's for more."""

    def pick(num_available: int, num_frames: int, view: int, num_views: int) -> np.ndarray:
        if num_views == 1:
            return single(num_available, num_frames)
        return several(num_available, num_frames, view, num_views)

    return pick


RULES: dict[str, tuple[Train, Eval]] = {
    "pretrain": (pretrain, segments_eval),
    "segments": (segments_train, segments_eval),
    "dense": (dense_train, _or_single(dense_validation, dense_test)),
    "frames": (frames_train, _or_single(frames_validation, frames_test)),
    "video": (video_train, _or_single(video_validation, frames_test)),
    # Stage 2: the original's "rand" in training and "middle" in evaluation, under either name.
    "rand": (spread_random, _or_single(middle, segments_eval)),
    "middle": (spread_random, _or_single(middle, segments_eval)),
    # Stage 3: training as in stage 2, and what the released `chat()` takes (spec stage3 4.4).
    "chat": (spread_random, segments_eval),
}
_RATE = re.compile(r"fps(\d+\.?\d*|\.\d+)")


def rule(
    name: str, *, stride: int = 4, fps: float | None = None, released: bool = False
) -> tuple[Train, Eval]:
    """The (training, evaluation) rule of this name.

    Args:
      name: one of `RULES`, or `fpsX`: X frames a second from the clip's beginning, the first T of
        them; short clips repeat their last frame. It draws nothing and has one view.
      stride: distance of the frames for `dense`.
      fps: frames per second of the clip, for `fpsX`; may be left out to check a name.
      released: `rand`, `middle` and `dense` with the released code's faults.

    Raises:
      ConfigError: there is none; or (by the rule itself) `fpsX` is without the clip's rate.
    """
    rate = _RATE.fullmatch(name)
    if rate is not None and float(rate[1]) > 0:
        return _rate_rule(name, float(rate[1]), fps)
    if name not in RULES:
        known = ", ".join(sorted([*RULES, "fpsX"]))
        hint = nearest(name, RULES)
        hint = hint if "did you mean" in hint else f"; known: {known}"
        raise ConfigError(f"sampling {name!r} is not known{hint}")
    if name == "dense":
        validation = functools.partial(dense_validation, stride=stride, released=released)
        test = functools.partial(dense_test, stride=stride)
        return functools.partial(dense_train, stride=stride), _or_single(validation, test)
    train, evaluate = RULES[name]
    if released and train is spread_random:
        train = functools.partial(spread_random, released=True)
    return train, evaluate


def _rate_rule(name: str, rate: float, fps: float | None) -> tuple[Train, Eval]:
    """`fpsX` for a clip of this rate."""

    def pick(num_available: int, num_frames: int, *_: object) -> np.ndarray:
        if fps is None or not fps > 0:
            raise ConfigError(f"sampling {name!r} needs clips that have a frame rate")
        return at_fixed_rate(num_available, num_frames, fps, rate)

    def evaluate(num_available: int, num_frames: int, view: int, num_views: int) -> np.ndarray:
        if num_views != 1:
            raise ConfigError(f"sampling {name!r} has one view, {num_views} are asked for")
        return pick(num_available, num_frames)

    return pick, evaluate
