"""The annotation files of the released code (spec stage2 8.3): a JSON list of records.

| use | keys |
|---|---|
| pictures | `image`, `caption` or `captions`, `crop_bbox` |
| videos | `video`, `caption`, `video_start_frame`, `video_end_frame`, `video_fps` |
| videos with sound | the same, `audio` (a file of its own), any key with `caption` in its name |
| sound | `audio`, `caption` or `captions` |
| retrieval | `caption`, text or list; `asr`, `asr_trimmed_30` |
| recognition | `caption`, the name of the class |
| multiple choice | `option`s (or `caption`s) and `answer`: a number, or a list of 0 and 1 |
| questions | `question`, `answer`, `question_id`; the file may be called `media` |

What becomes of them: `caption` and `captions` are the caption `video` (of a record with sound
alone: `audio`), every other key with `caption` in its name, `asr` and `asr_trimmed_30` the captions
of these names. Frame numbers become seconds. `crop_bbox`, `option` and `answer` become `crop`,
`options` and `answers`, a question with its answers `qa`, and `question_id` the id. Relative paths
start where those of every manifest do.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from iv2_jax.data.records import Clip, FieldError, box, misspelt, places, show, texts

_FILES = ("video", "image", "media")  # and `audio`, which may be beside one of these
_TEXTS = ("asr", "asr_trimmed_30")
_FRAMES = ("video_start_frame", "video_end_frame", "video_fps")
KEYS = (
    *(*_FILES, "audio", "caption", "captions", *_TEXTS, *_FRAMES),
    *("crop_bbox", "option", "answer", "question", "question_id", "split", "group", "video_name"),
)
_SHARED = ("captions", "split", "group")  # keys that say nothing about whose record it is
_OURS = ("path", "file", "id", "start", "end", "label", "labels", "qa", "sound", "topic", "action")


def looks_like(item: Any) -> bool:
    """Whether a record is one of these rather than one of ours."""
    if not isinstance(item, dict) or "path" in item or "file" in item:
        return False
    theirs = sum(key in KEYS or "caption" in key for key in item if key not in _SHARED)
    return theirs > sum(key in _OURS for key in item)


def clip_from_annotation(item: Any) -> Clip:
    """Checks every field of one record.

    Raises:
      FieldError: a field is missing or wrong; the message says what is allowed.
    """
    if not isinstance(item, dict):
        raise FieldError("", f"must be a JSON object, is {show(item)}")
    _check_spelling(item)
    files = {name: _file(item, name) for name in (*_FILES, "audio") if item.get(name) is not None}
    pictures = [name for name in _FILES if name in files]
    if len(pictures) > 1:
        raise FieldError(pictures[1], f"is given beside {pictures[0]!r}: a record has one file")
    captions = _captions(item, "video" if pictures or not files else "audio")
    if not files and not captions:
        raise FieldError("video", "is missing: give video, image or audio (or text alone: caption)")
    path = files[pictures[0]] if pictures else files.get("audio", "")
    options, answers = _choice(item, captions)
    start, end = _stretch(item)
    number = item.get("question_id")
    if number is not None and (isinstance(number, bool) or not isinstance(number, int | str)):
        raise FieldError("question_id", f"must be a text or a whole number, is {show(number)}")
    return Clip(
        id="" if number is None else str(number),
        path=path,
        start=start,
        end=end,
        captions=captions,
        qa=_questions(item, options, answers),
        split=_optional(item, "split"),
        group=_optional(item, "group"),
        sound=files.get("audio") if pictures else None,
        crop=box(item.get("crop_bbox"), "crop_bbox"),
        options=options,
        answers=answers,
    )


def _check_spelling(item: Mapping[str, Any]) -> None:
    """Refuses keys that are nearly one of ours; others are other programs'."""
    for key in item:
        close = "" if "caption" in key else misspelt(key, KEYS)
        if close and close not in item:
            raise FieldError(key, f"unknown field; did you mean {close!r}?")


def _file(item: Mapping[str, Any], name: str) -> str:
    """A path that is not blank."""
    path = item[name]
    if not isinstance(path, str) or not path.strip():
        raise FieldError(name, f"must be the path of a file, is {show(path)}")
    return path


def _optional(item: Mapping[str, Any], name: str) -> str | None:
    """A text or None."""
    value = item.get(name)
    if value is not None and not isinstance(value, str):
        raise FieldError(name, f"must be a text, is {show(value)}")
    return value


def _captions(item: Mapping[str, Any], unnamed: str) -> dict[str, tuple[str, ...]]:
    """All captions by name; `caption` and `captions` go by the name `unnamed`."""
    found: dict[str, tuple[str, ...]] = {}
    for key, value in item.items():
        if value is None or not ("caption" in key or key in _TEXTS):
            continue
        name = unnamed if key in ("caption", "captions") else key
        found[name] = found.get(name, ()) + texts(value, key)
    return found


def _stretch(item: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """First and last second, from the numbers of the frames."""
    start, end, fps = (item.get(name) for name in _FRAMES)
    if start is None and end is None:
        return None, None
    for name, value in zip(_FRAMES[:2], (start, end), strict=True):
        good = value is None or (isinstance(value, int | float) and value >= 0)
        if not good or isinstance(value, bool):
            raise FieldError(name, f"must be the number of a frame from 0 on, is {show(value)}")
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not fps > 0:
        raise FieldError(
            "video_fps", f"must be the frames a second that frame numbers go by, is {show(fps)}"
        )
    if end is not None and end <= (start or 0):
        raise FieldError(
            "video_end_frame", f"must be later than video_start_frame ({start or 0}), is {end}"
        )
    return None if start is None else start / fps, None if end is None else end / fps


def _choice(
    item: Mapping[str, Any], captions: dict[str, tuple[str, ...]]
) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Options and places of the right ones; five captions to choose from become one caption."""
    answer = item.get("answer")
    if item.get("option") is not None:
        options, field = texts(item["option"], "option"), "option"
    elif type(answer) is int and "question" not in item and isinstance(item.get("caption"), list):
        options, field = texts(item["caption"], "caption"), "caption"
    else:
        if answer is not None and "question" not in item:
            raise FieldError("answer", "needs `option`, a list of `caption`s or a `question`")
        return (), ()
    flags = isinstance(answer, list) and len(answer) == len(options) and set(answer) <= {0, 1}
    chosen = [i for i, flag in enumerate(answer) if flag] if flags else [answer]
    if answer is None:
        raise FieldError("answer", f"is missing: a place among the {len(options)} of {field!r}")
    answers = places(chosen, "answer", len(options))
    if field == "caption":
        captions["video"] = tuple(options[i] for i in answers)
    return options, answers


def _questions(
    item: Mapping[str, Any], options: tuple[str, ...], answers: tuple[int, ...]
) -> tuple[tuple[str, str], ...]:
    """The question with each of its answers."""
    question = _optional(item, "question")
    if question is None:
        return ()
    if options:
        return tuple((question, options[i]) for i in answers)
    if item.get("answer") is None:
        raise FieldError("answer", "is missing; a question needs one (a text or a list of texts)")
    return tuple((question, answer) for answer in texts(item["answer"], "answer"))
