"""Orbax checkpoints: asynchronous, whole or not there, restorable onto any mesh.

A step folder holds four items: `params` (so that weights can be read alone), `train` (optimizer
state, moving average, step), `data` (position in the data and counts) and `config`; and
`checksums.json`. In a run of several processes all of them must call the same methods.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from iv2_jax import storage
from iv2_jax.errors import CheckpointError, ConfigError
from iv2_jax.parallel import distributed
from iv2_jax.train import checksums
from iv2_jax.train.save_barrier import SaveBarrier
from iv2_jax.train.state import TrainState

logger = logging.getLogger(__name__)

FOLDER = "checkpoints"
_WRITE_SECONDS = 600  # for the processes to finish their parts of an asynchronous write
# Fields a run may change when it goes on: they do not change any number that it computes.
FREE_FIELDS = (
    "log_every",
    "eval_every",
    "eval_batches",
    "eval_data",
    "eval_batch_size",
    "test_views",
    "test_crops",
    "checkpoint",
    "mesh",
    "resume",
    "tensorboard",
    "stop_after",
    "on_nan",
    "max_skipped",
    "step_timeout",
    "stop_timeout",
    "data.num_workers",
    "data.threads",
    "data.prefetch",
    "data.max_bad_share",
)


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep.

    Attributes:
      every: Steps between saves; the last step is always saved. 0 = only the last.
      keep: Newest checkpoints kept.
      asynchronous: Write in the background while training goes on.
      checksums: Read back what was written and keep its checksums, which a restore looks at.
    """

    every: int = 1000
    keep: int = 2
    asynchronous: bool = True
    checksums: bool = True

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"checkpoint.every must be >= 0, not {self.every}")
        if self.keep < 1:
            raise ConfigError(f"checkpoint.keep must be >= 1, not {self.keep}")


class Checkpointer:
    """Saves and restores the checkpoints of one workdir."""

    def __init__(self, workdir: Path, config: CheckpointConfig) -> None:
        self._config = config
        self._folder = storage.absolute(workdir / FOLDER)
        self._saving = -1  # step of the save under way
        self._barrier = SaveBarrier() if jax.process_count() > 1 else None
        self._broken = False  # the last write failed
        self._manager = self._open()
        self._damage: dict[int, str | None] = {}  # of the steps looked at
        self.failures: list[str] = []

    def _open(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._config.keep,
            enable_async_checkpointing=True,  # else `save` waits for it
            # What a killed process left half written.
            cleanup_tmp_directories=True,
            async_options=ocp.options.AsyncOptions(
                timeout_secs=_WRITE_SECONDS,
                barrier_sync_fn=self._barrier,
                # Before the commit: a complete checkpoint has its checksums.
                post_finalization_callback=self._write_checksums,
            ),
        )
        return ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def due(self, step: int) -> bool:
        """Whether the schedule asks for a checkpoint after `step` steps."""
        return bool(self._config.every) and step % self._config.every == 0

    def save(self, state: TrainState, data: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
        """Saves `state` under its step; returns False (and remembers why) when it cannot.

        A disk that is full or a folder that is gone does not end the run: the last complete
        checkpoint stays, the failure is logged and reported at the end.
        """
        step = int(state.step)
        if step in self._manager.all_steps():
            return True
        train = {"step": state.step, "opt_state": state.opt_state, "ema": state.ema}
        args = ocp.args.Composite(
            params=ocp.args.StandardSave(state.params),
            train=ocp.args.StandardSave(train),
            data=ocp.args.JsonSave(dict(data)),
            config=ocp.args.JsonSave(dict(config)),
        )

        def begin() -> None:
            self._saving = step
            if self._barrier is not None:
                self._barrier.begin()
            self._manager.save(step, args=args, force=True)

        # One write at a time; a failed one is only told now, and its remains go before the next.
        before = self.wait()
        # Inside `begin` the processes wait for each other, so none may fail there alone.
        if not self._together(step, self._probe):
            return False
        if self._broken:
            self._manager = self._open()  # now what is left of the failed one can be deleted
            self._broken = False
        saved = self._together(step, begin)
        if not self._config.asynchronous:
            saved = self.wait() and saved
        return saved and before

    def _probe(self) -> None:
        """Process 0 makes a folder beside the checkpoints and writes a byte into it.

        Raises:
          OSError: The disk is full, or nothing may be written there.
        """
        if jax.process_index() == 0 and not storage.is_remote(self._folder):
            with tempfile.TemporaryDirectory(dir=self._folder, prefix=".probe") as probe:
                (Path(probe) / "byte").write_bytes(b"x")

    def wait(self) -> bool:
        """Waits for the write under way; False when it failed."""
        return self._together(None, self._finish_write)

    def close(self) -> None:
        """Waits for what is under way and lets go of the folder; needs no other process."""
        try:
            self._finish_write()
        except Exception as error:  # as in `_together`
            self._record(None, error)
            return
        self._manager.close()

    def _finish_write(self) -> None:
        self._manager.wait_until_finished()
        self._manager.check_for_errors()

    def _write_checksums(self) -> None:
        """Checksums of the save under way, in its folder before or after it gets its name."""
        if not self._config.checksums or jax.process_index() != 0:
            return
        name = str(self._saving)
        found = [
            child
            for child in self._folder.iterdir()
            if child.name == name or child.name.startswith(f"{name}.orbax-checkpoint-tmp")
        ]
        checksums.write(max(found, key=lambda child: len(child.name)))

    def _together(self, step: int | None, act: Callable[[], Any]) -> bool:
        """Does part of a write; when it failed in any process, all start over. False then."""
        error: Exception | None = None
        try:
            act()
        except Exception as caught:  # what can fail is the file system's choice, not ours
            error = caught
        if not distributed.any_process(error is not None):
            return True
        self._record(step, error or OSError("it failed in another process, see its log"))
        self._broken = True
        try:
            if not distributed.any_process(not self._folder.is_dir()):
                self._manager = self._open()  # drops the remains, which may be what fills the disk
        except OSError as second:
            logger.error("the checkpoint folder cannot be opened again: %s", second)
        return False

    def _record(self, step: int | None, error: Exception) -> None:
        """Remembers and tells a failed write."""
        where = f"checkpoint at step {step}" if step is not None else "a checkpoint"
        reason = _reason(error)
        self.failures.append(f"{where} in {self._folder}: {reason}")
        logger.error(
            "%s could not be written: %s. The last complete one stays; training goes on.",
            where,
            reason,
        )

    def _whole_steps(self) -> Iterator[int]:
        """Checkpoints whose files are as written, newest first; says which are not."""
        for step in sorted(self._manager.all_steps(), reverse=True):
            if step not in self._damage:
                self._damage[step] = self._look(step)
            if self._damage[step] is None:
                yield step

    def _look(self, step: int) -> str | None:
        """What is wrong with a checkpoint's files; the processes share them out."""
        share = {"process": jax.process_index(), "processes": jax.process_count()}
        why = checksums.damage(self._folder / str(step), **share)
        if not distributed.any_process(why is not None):
            return None
        why = why or "another process found a damaged file"
        logger.error("CHECKPOINT %d IS DAMAGED and is passed over: %s", step, why)
        return why

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any], dict[str, Any]]:
        """Restores the newest checkpoint that can be read onto the shardings of `abstract`.

        Returns:
          The state, the data position and the config it was saved with.

        Raises:
          CheckpointError: None of the checkpoints can be read; says why for each.
        """
        train = {"step": abstract.step, "opt_state": abstract.opt_state, "ema": abstract.ema}
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(abstract.params),
            train=ocp.args.StandardRestore(train),
            data=ocp.args.JsonRestore(),
            config=ocp.args.JsonRestore(),
        )
        for step in self._whole_steps():
            why, got = None, None
            try:
                got = self._manager.restore(step, args=args)
            except Exception as error:  # a damaged file surfaces as many kinds of error
                why = _reason(error)
            if distributed.any_process(why is not None):
                self._damage[step] = why or "another process could not read it"
                logger.error("checkpoint %d cannot be read, trying the one before it", step)
                continue
            for bad, text in self._damage.items():
                if text is not None:
                    logger.warning("passed over a damaged checkpoint:  step %d: %s", bad, text)
            return TrainState(params=got.params, **got.train), got.data, got.config
        reasons = [f"  step {step}: {why}" for step, why in self._damage.items() if why]
        raise CheckpointError(
            f"no readable checkpoint in {self._folder}:\n" + "\n".join(reasons or ["  none there"])
        )

    def discard_after(self, step: int) -> None:
        """Deletes checkpoints newer than `step` (damaged ones that a restore passed over)."""
        for newer in [s for s in self._manager.all_steps() if s > step]:
            self._manager.delete(newer)

    def saved_config(self) -> dict[str, Any]:
        """The config saved with the newest checkpoint whose config can be read.

        Raises:
          CheckpointError: There is none.
        """
        for step in self._whole_steps():
            try:
                args = ocp.args.Composite(config=ocp.args.JsonRestore())
                return self._manager.restore(step, args=args).config
            except Exception as error:  # as in `restore`
                logger.error("config of checkpoint %d cannot be read: %s", step, _reason(error))
        raise CheckpointError(f"no checkpoint with a readable config in {self._folder}")


def check_same_run(saved: Mapping[str, Any], now: Mapping[str, Any], workdir: Path) -> None:
    """Refuses to go on with a run whose config differs in anything that changes its numbers.

    Raises:
      CheckpointError: Lists each differing field with its old and new value.
    """
    old, new = _flatten(saved), _flatten(now)
    differing = [
        f"  config.{name}: {old.get(name, 'absent')!r} -> {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name, "absent") != new.get(name, "absent")
        and not any(name == free or name.startswith(f"{free}.") for free in FREE_FIELDS)
    ]
    if differing:
        raise CheckpointError(
            f"{workdir} holds a checkpoint of another config:\n"
            + "\n".join(differing[:20])
            + "\nTake the config of that run, or another --workdir (with --config.init_from to "
            "start from these weights), or --config.resume=force to go on all the same."
        )


def _flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(values, Mapping):
        flat = {}
        for key, value in values.items():
            flat |= _flatten(value, f"{prefix}.{key}" if prefix else str(key))
        return flat
    return {prefix: list(values) if isinstance(values, tuple) else values}


def load_params(
    path: str | Path, step: int | None = None, *, ema: bool = False
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the weights of a checkpoint as NumPy arrays, with the config of its run.

    Args:
      path: A workdir, its `checkpoints` folder, or one step folder in it.
      step: Which step; default the newest.
      ema: The moving average instead of the parameters.

    Returns:
      The nested dict of parameters, and the run's config as plain values.

    Raises:
      CheckpointError: No checkpoint there, or it has no moving average.
    """
    folder, step = _locate(storage.path(path), step)
    steps = sorted(int(c.name) for c in folder.iterdir() if c.name.isdigit())
    if not steps or (step is not None and step not in steps):
        raise CheckpointError(f"no checkpoint of step {step} in {folder}; there are {steps}")
    item = storage.absolute(folder / str(step if step is not None else steps[-1]))
    for part in ("config", "train" if ema else "params"):
        if why := checksums.damage(item, under=part):
            raise CheckpointError(f"checkpoint {item} is damaged: {why}; take another step")
    config = json.loads((item / "config" / "metadata").read_text())
    if not ema:
        return _read_numpy(item / "params"), config
    average = _read_numpy(item / "train").get("ema") if (item / "train").is_dir() else None
    if average is None:
        raise CheckpointError(f"{item} has no moving average (optimizer.ema_decay was 0)")
    return average, config


def _read_numpy(item: Path) -> dict[str, Any]:
    """One item of a checkpoint as host arrays, whatever mesh wrote it."""
    reader = ocp.PyTreeCheckpointer()
    tree = reader.metadata(item).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return reader.restore(item, restore_args=as_numpy)


def _locate(path: Path, step: int | None) -> tuple[Path, int | None]:
    """The checkpoints folder that `path` means, and the step if `path` is a step folder."""
    if (path / FOLDER).is_dir():
        return path / FOLDER, step
    if path.name.isdigit() and (path / "params").is_dir():
        return path.parent, int(path.name)
    if path.is_dir() and any(child.name.isdigit() for child in path.iterdir()):
        return path, step
    raise CheckpointError(
        f"no checkpoint at {path}: expected a workdir with a {FOLDER}/ folder, that folder, or "
        "one of its step folders"
    )


def check_writable(workdir: Path) -> None:
    """Makes the workdir and writes a byte to it, so that a run does not learn it hours later.

    Raises:
      CheckpointError: It cannot be made or written to; says why.
    """
    if storage.is_remote(workdir):
        probe = workdir / f".writable_{jax.process_index()}"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            probe.write_text("x")
            probe.unlink()
        except Exception as error:  # the bucket's library has error types of its own
            raise CheckpointError(
                f"cannot write to --workdir {workdir}: {_reason(error)}. Does the bucket exist, "
                "and may this machine's account write to it (roles/storage.objectAdmin)?"
            ) from None
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=workdir, prefix=".writable") as probe:
            probe.write(b"x")
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise CheckpointError(f"cannot write to --workdir {workdir}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    """One line that says what went wrong, with plain words for a full disk."""
    seen: BaseException | None = error
    while seen is not None:
        if getattr(seen, "errno", None) == errno.ENOSPC or "No space left" in str(seen):
            return "the disk is full (no space left on device)"
        seen = seen.__cause__ or seen.__context__
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"


def abstract_like(state: TrainState, shardings: TrainState) -> TrainState:
    """Shapes, dtypes and shardings of a state: the target of `restore`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
