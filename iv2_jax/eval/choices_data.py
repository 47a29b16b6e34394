"""Questions with options from files: MVBench's own JSON, and a plain list.

MVBench is a folder of one JSON list for each task, `action_sequence.json` and so on, and videos in
a folder for each source of them (spec stage3 11.1). A plain list is JSON or JSONL of objects with
`video` (or `image`, `path`), `question`, `candidates` (or `options`) and `answer`, which is the
right option's text, its letter, or its number from 0 on; `start`, `end`, `task`, `id` may be there.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iv2_jax.data import manifest
from iv2_jax.data.instruct import fields
from iv2_jax.data.instruct.conversations import KINDS, Medium, joined, kind_of, seconds
from iv2_jax.data.records import FieldError, show
from iv2_jax.errors import DataError
from iv2_jax.eval.answer_parser import letter
from iv2_jax.eval.answers_prompts import Question


@dataclasses.dataclass(frozen=True)
class _Task:
    """Where a task's videos are, under the folder of all of them, and whether it asks about a
    stretch of each; `start` and `end` of other tasks' items mean nothing.
    """

    folder: str
    bound: bool = False


# The layout in which MVBench's videos are published.
MVBENCH: dict[str, _Task] = {
    "action_sequence": _Task("star/Charades_v1_480", bound=True),
    "action_prediction": _Task("star/Charades_v1_480", bound=True),
    "action_antonym": _Task("ssv2_video"),
    "fine_grained_action": _Task("Moments_in_Time_Raw/videos"),
    "unexpected_action": _Task("FunQA_test/test"),
    "object_existence": _Task("clevrer/video_validation"),
    "object_interaction": _Task("star/Charades_v1_480", bound=True),
    "object_shuffle": _Task("perception/videos"),
    "moving_direction": _Task("clevrer/video_validation"),
    "action_localization": _Task("sta/sta_video", bound=True),
    "scene_transition": _Task("scene_qa/video"),
    "action_count": _Task("perception/videos"),
    "moving_count": _Task("clevrer/video_validation"),
    "moving_attribute": _Task("clevrer/video_validation"),
    "state_change": _Task("perception/videos"),
    "fine_grained_pose": _Task("nturgbd"),
    "character_order": _Task("perception/videos"),
    "egocentric_navigation": _Task("vlnqa"),
    "episodic_reasoning": _Task("tvqa/frames_fps3_hq", bound=True),
    "counterfactual_inference": _Task("clevrer/video_validation"),
}

_FILES = ("video", "image", "path")
_PROBED = 32  # items that tell under which folder a task's videos are


@dataclasses.dataclass(frozen=True)
class QuestionSet:
    """Questions of a folder or file.

    Attributes:
      questions: those whose clips are there, task after task, in the files' order.
      missing: question -> path of its clip that is not there.
      is_mvbench: the names of the tasks are MVBench's.
    """

    questions: list[Question]
    missing: dict[str, str]
    is_mvbench: bool

    def tasks(self) -> dict[str, list[int]]:
        """Task -> its questions' places in the list."""
        found: dict[str, list[int]] = {}
        for at, question in enumerate(self.questions):
            found.setdefault(question.task, []).append(at)
        return found


def read_choices(
    source: str | os.PathLike[str],
    videos: str = "",
    *,
    tasks: Sequence[str] = (),
    missing: str = "error",
) -> QuestionSet:
    """Reads questions with options.

    Args:
      source: folder of task files, or one file.
      videos: folder that clips are looked for in; empty: that of the file. Tasks of MVBench have
        their clips in the benchmark's folders below it, below `video` in it, or in itself.
      tasks: only these; empty for all.
      missing: clips that are not there are an `error`, or their questions are left out and named
        (`skip`).

    Raises:
      DataError: a file or a record cannot be used; names file, line, record and field. Or clips
        are missing, or nothing is left.
    """
    if missing not in ("error", "skip"):
        raise ValueError(f"missing={missing!r}: choose 'error' or 'skip'")
    files = _files(Path(source), tasks)
    found: list[Question] = []
    gone: dict[str, str] = {}
    for file in files:
        task = MVBENCH.get(file.stem)
        records = list(_records(file))
        root = _root(videos or str(file.parent), task, [r for _, _, r in records[:_PROBED]])
        for record, line, item in records:
            try:
                question = _question(item, file, record, task, root)
            except FieldError as e:
                where = f"{file}:{line}: record {record}"
                raise DataError(f"{where}: {e.field}: {e.message}") from None
            except DataError as e:
                raise DataError(f"{file}:{line}: record {record}: {e}") from None
            if question.medium is None or _exists(question.medium.path):
                found.append(question)
            else:
                gone[question.id] = question.medium.path
    _check_names(found, gone)
    if tasks and Path(source).is_file():
        found = [question for question in found if question.task in tasks]
    total = len(found) + len(gone)
    if gone and missing == "error":
        first = "; ".join(f"{name}: {path}" for name, path in list(gone.items())[:3])
        raise DataError(
            f"clips of {len(gone)} of {total} questions are not there ({first}; ...): give their "
            "folder with --videos, or leave these questions out with --skip-missing"
        )
    if not found:
        raise DataError(f"{source}: no question is left of {total}")
    return QuestionSet(found, gone, all(file.stem in MVBENCH for file in files))


def _files(source: Path, tasks: Sequence[str]) -> list[Path]:
    """The files of a folder in the benchmark's order, others behind; or the one file."""
    if source.is_file():
        return [source]
    if not source.is_dir():
        raise DataError(f"{source}: does not exist; give a folder of task files, or one file")
    order = list(MVBENCH)
    files = sorted(
        (f for f in source.iterdir() if f.suffix in (".json", ".jsonl")),
        key=lambda f: (order.index(f.stem) if f.stem in MVBENCH else len(order), f.name),
    )
    if not files:
        raise DataError(f"{source}: holds no .json or .jsonl file of questions")
    unknown = [name for name in tasks if name not in {f.stem for f in files}]
    if unknown:
        known = ", ".join(f.stem for f in files)
        raise DataError(f"{source}: has no task {unknown[0]!r}; it has {known}")
    return [f for f in files if not tasks or f.stem in tasks]


def _records(file: Path) -> list[tuple[int, int, Mapping[str, Any]]]:
    """(record, line, object) of a JSON list or JSON lines."""
    text = manifest._read_text(file)
    if not text.strip():
        raise DataError(f"{file}: is empty; it needs at least one question")
    read_items = manifest._json_list if text.lstrip()[0] == "[" else manifest._json_lines
    found = []
    for record, (line, item) in enumerate(read_items(text), start=1):
        if isinstance(item, FieldError):
            raise DataError(f"{file}:{line}: record {record}: {item.message}")
        if not isinstance(item, Mapping):
            raise DataError(f"{file}:{line}: record {record}: must be an object, is {show(item)}")
        found.append((record, line, item))
    return found


def _question(
    item: Mapping[str, Any], file: Path, record: int, task: _Task | None, root: str
) -> Question:
    """A record as a question."""
    key = next((name for name in ("candidates", "options") if name in item), "candidates")
    options = fields.listed(item.get(key), key, "options")
    texts = tuple(fields.text(text, f"{key}[{at}]") for at, text in enumerate(options))
    if any(not text.strip() for text in texts):
        raise FieldError(key, "has an option without text")
    if "question" not in item:
        raise FieldError("question", f"is missing; there are {', '.join(sorted(item))}")
    name = fields.text(item.get("task", item.get("kind", file.stem)), "task")
    return Question(
        id=_identifier(item, file, record),
        text=fields.text(item["question"], "question"),
        answer=texts[_answer(item.get("answer"), texts)],
        options=texts,
        medium=_medium(item, task, root),
        task=file.stem if task else name,
        instruction=fields.text(item.get("instruction", ""), "instruction"),
    )


def _identifier(item: Mapping[str, Any], file: Path, record: int) -> str:
    """A name that no other question of the set has: `id` may be the clip's."""
    given = fields.identifier(item)
    return f"{file.stem}:{record}:{given}" if given else f"{file.stem}:{record}"


def _answer(answer: Any, options: Sequence[str]) -> int:
    """Place of the right option by its text, letter or number."""
    if isinstance(answer, int) and not isinstance(answer, bool):
        if 0 <= answer < len(options):
            return answer
        raise FieldError("answer", f"is {answer}; the {len(options)} options count from 0 on")
    if isinstance(answer, str):
        if answer in options:
            return options.index(answer)
        letters = [letter(i) for i in range(min(len(options), 26))]
        if answer.strip().upper().strip("()") in letters:
            return letters.index(answer.strip().upper().strip("()"))
    raise FieldError(
        "answer",
        f"must be one of the options {list(options)}, its letter or number, is {show(answer)}",
    )


def _medium(item: Mapping[str, Any], task: _Task | None, root: str) -> Medium | None:
    """The clip of a record, or None."""
    key = next((name for name in _FILES if item.get(name)), None)
    if key is None:
        return None
    path = joined(root, fields.path(item[key], key))
    start = end = None
    if task is None:
        start, end = seconds(item.get("start"), item.get("end"))
    elif task.bound:
        # Not in which order they are: the benchmark's code takes frames of any stretch.
        start, _ = seconds(item.get("start"), None)
        _, end = seconds(None, item.get("end") or None)
    return Medium(key if key in KINDS else kind_of(path), path, start, end)


def _root(videos: str, task: _Task | None, items: Sequence[Mapping[str, Any]]) -> str:
    """Where a task's clips are, by what is there."""
    if task is None:
        return videos
    below = [joined(videos, folder) for folder in (task.folder, f"video/{task.folder}")]
    for root in (*below, videos):
        for item in items:
            path = item.get("video")
            if isinstance(path, str) and path and _exists(joined(root, path)):
                return root
    return below[0]


def _exists(path: str) -> bool:
    """Whether a file or folder is there; URLs are taken to be."""
    return "://" in path or os.path.exists(path)


def _check_names(questions: Sequence[Question], gone: Mapping[str, str]) -> None:
    """Refuses two questions of one name: their answers could not be told apart."""
    seen = set(gone)
    for question in questions:
        if question.id in seen:
            raise DataError(f"two questions are named {question.id!r}")
        seen.add(question.id)
