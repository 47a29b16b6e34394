"""The one training loop. Stages give parameters, losses and batches; the rest is here.

What wins when a run starts: the newest checkpoint of its own workdir (`resume`), else the weights
of `init_from` at step 0, else fresh weights. Position in the data, masks and drop path are
functions of (seed, step), so a run that was stopped goes on with the numbers it would have had.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from clu import metrics as clu_metrics
from jax.sharding import Mesh

from iv2_jax import config as config_lib
from iv2_jax import storage
from iv2_jax.errors import ConfigError
from iv2_jax.parallel import distributed
from iv2_jax.parallel.mesh import batch_sharding, make_mesh, replicated
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import faults
from iv2_jax.train.goodput import Goodput
from iv2_jax.train.metrics import Clock, MetricWriter
from iv2_jax.train.profiling import Profiler
from iv2_jax.train.program import Program, build_program, put_frozen
from iv2_jax.train.stage import RunConfig, Stage, config_class
from iv2_jax.train.starting import starting_state
from iv2_jax.train.state import TrainState

logger = logging.getLogger(__name__)

EXIT_OK, EXIT_ERROR, EXIT_NAN, EXIT_RESTART = 0, 1, 3, distributed.EXIT_RESTART


@dataclass(frozen=True)
class Ending:
    """Why a run ended.

    Attributes:
      reason: "complete", "stopped" (signal or `stop_after`), "nan" or "unsaved".
      step: Steps done.
      exit_code: For the shell; 75 asks to be started again.
      text: One sentence for people.
    """

    reason: str
    step: int
    exit_code: int
    text: str


def train(
    config: RunConfig, workdir: str | Path, *, profile: tuple[tuple[int, int], ...] = ()
) -> Ending:
    """Trains to `config.steps` in `workdir`, going on from its newest checkpoint if it has one.

    Args:
      config: What to train.
      workdir: Folder of checkpoints, metrics and profiles; may be in a bucket, gs://.
      profile: Ranges of steps to trace, both ends included.

    Returns:
      Why it ended; the same is logged as the last line.

    Raises:
      UserError: A config, checkpoint, data or weight file that cannot be used; before step 1
        wherever it can be known before.
    """
    workdir = storage.path(workdir)
    try:
        ending = _train(config, workdir, profile)
    except BaseException as error:
        logger.error("run ended: %s: %s", type(error).__name__, str(error).split("\n")[0])
        raise
    log = logger.info if ending.exit_code == EXIT_OK else logger.warning
    log("run ended: %s", ending.text)
    return ending


def _train(config: RunConfig, workdir: Path, profile: tuple[tuple[int, int], ...]) -> Ending:
    """`train` without the last line."""
    started = time.monotonic()
    checkpoint_lib.check_writable(workdir)
    plain_config = config_lib.to_dict(config)
    _check_processes(workdir, plain_config)
    goodput = Goodput(workdir, active=jax.process_index() == 0)
    mesh = make_mesh(config.mesh)
    stage = config.make_stage()
    program = build_program(config, stage, mesh)
    checkpointer = checkpoint_lib.Checkpointer(workdir, config.checkpoint)
    state = starting_state(config, workdir, stage, program, checkpointer, plain_config)
    first_step = int(state.step)
    if first_step >= config.steps:
        text = f"nothing to do: {workdir} is already at step {first_step} of {config.steps}"
        return Ending("complete", first_step, EXIT_OK, text)
    _write_config(workdir, plain_config)
    if jax.process_index() == 0:
        logger.info("\n%s", program.report)

    frozen = put_frozen(stage, mesh, config.mesh)
    with goodput.spent("compile"):
        steps = program.compile_steps()
    make_key = jax.jit(jax.random.key, static_argnums=0, out_shardings=replicated(mesh))
    key = make_key(config.seed)  # not `device_put`: the mesh may be of several processes
    writer = MetricWriter(workdir, config.steps, first_step, tensorboard=config.tensorboard)
    profiler = Profiler(workdir, profile)
    bad_steps = faults.BadSteps(workdir, config.on_nan, config.max_skipped, first_step)
    watchdog = faults.Watchdog(config.step_timeout, config.stop_timeout)
    loop = _Loop(
        config,
        stage,
        program,
        steps,
        checkpointer,
        writer,
        goodput,
        profiler,
        bad_steps,
        watchdog,
        frozen,
        key,
        plain_config,
    )
    goodput.begin(first_step)
    try:
        with faults.stop_on_signal(watchdog.stopping) as stop, goodput.spent("step"):
            reason, state = loop.run(state, stop)
        with goodput.spent("checkpoint"):
            watchdog.alive("waiting for the last checkpoint to be written")
            ending = _finish(config, workdir, reason, int(state.step), checkpointer, started)
    except BaseException:
        checkpointer.close()  # what is being written is still finished
        raise
    finally:
        watchdog.close()
        profiler.close()
        writer.close()
    goodput.write()
    if jax.process_index() == 0:
        logger.info(goodput.line())
    return ending


class _Done(NamedTuple):
    """A step on its way: its metrics are fetched while the next one runs."""

    step: int
    kind: str
    metrics: dict[str, jax.Array]
    shared: distributed.Shared  # figures of the hosts
    clips: np.ndarray  # this process's rows, by their place in the list of clips


class _Loop:
    """The steps between start and end of one process's run."""

    def __init__(
        self,
        config: RunConfig,
        stage: Stage,
        program: Program,
        compiled: dict[str, jax.stages.Compiled],
        checkpointer: checkpoint_lib.Checkpointer,
        writer: MetricWriter,
        goodput: Goodput,
        profiler: Profiler,
        bad_steps: faults.BadSteps,
        watchdog: faults.Watchdog,
        frozen: Any,
        key: jax.Array,
        plain_config: dict[str, Any],
    ) -> None:
        self.config, self.stage, self.program = config, stage, program
        self.compiled = compiled
        self.checkpointer, self.writer = checkpointer, writer
        self.goodput, self.profiler = goodput, profiler
        self.bad_steps, self.watchdog = bad_steps, watchdog
        self.hosts = distributed.Hosts(program.mesh)
        self.clock = Clock()
        self.frozen, self.key, self.plain_config = frozen, key, plain_config
        self.replaced = 0

    def run(self, state: TrainState, stop: faults.StopFlag) -> tuple[str, TrainState]:
        """Trains from `state` until the last step, a signal, `stop_after` or a NaN."""
        first = int(state.step)
        with self.watchdog.paused("preparing"):
            self.stage.start(state.params, self.program.mesh)
        if first == 0:
            self.evaluate(state)
        with contextlib.closing(self.stage.train_batches(first)) as batches:
            reason, state = self.steps(state, first, batches, stop)
        if reason == "nan":
            return reason, state
        if reason == "complete":
            self.evaluate(state)
        self.save(state)
        return reason, state

    def steps(
        self, state: TrainState, first: int, batches: Iterator[Any], stop: faults.StopFlag
    ) -> tuple[str, TrainState]:
        """The steps themselves, with the evaluations and checkpoints between them."""
        config, step = self.config, first
        self.clock = Clock()
        pending: _Done | None = None
        while step < config.steps:
            self.watchdog.alive(f"waiting for the data of step {step + 1}")
            with self.clock.waiting(), self.goodput.spent("data_wait"):
                batch = next(batches)
            arrays = to_device(batch, self.stage.host_arrays, self.program.mesh)
            step += 1
            self.watchdog.alive(f"in step {step}")
            self.profiler.before(step, state)
            with (
                jax.transfer_guard("disallow"),
                jax.profiler.StepTraceAnnotation("train", step_num=step),
            ):
                kind = batch.get("media", "")
                state, metrics = self.compiled[kind](state, self.frozen, arrays, self.key)
            self.profiler.after(step, state)
            shared = self.hosts.share(
                stop=stop.requested,
                replaced=np.sum(batch.get("replaced", 0)),
                waited=self.clock.waited(),
            )
            if pending and not self.report(pending, stop):
                return "nan", state
            pending = _Done(step, kind, metrics, shared, np.asarray(batch.get("index", ())))
            asked = stop.requested if self.hosts.alone else stop.agreed
            stopping = asked or (config.stop_after and step - first >= config.stop_after)
            if stopping or self.eval_due(step) or self.checkpointer.due(step):
                # A checkpoint must not hold a NaN, so its own step is looked at first.
                if not self.report(pending, stop):
                    return "nan", state
                pending = None
                if stopping:
                    return "stopped", state
                if self.eval_due(step):
                    self.evaluate(state)
                if self.checkpointer.due(step):
                    self.save(state)
        if pending and not self.report(pending, stop):
            return "nan", state
        return "complete", state

    def eval_due(self, step: int) -> bool:
        """Whether to evaluate after `step` in mid-run."""
        every = self.config.eval_every
        return bool(every) and step % every == 0 and step < self.config.steps

    def report(self, done: _Done, stop: faults.StopFlag) -> bool:
        """Fetches and writes the metrics of a step; False when it ends the run as not finite."""
        step, kind = done.step, done.kind
        values = {k: float(v) for k, v in jax.device_get(done.metrics).items()}
        sums, slowest = done.shared.get()
        stop.agreed |= sums["stop"] > 0
        if stop.agreed:
            self.watchdog.stopping()
        self.replaced += int(sums["replaced"])
        clips = next(iter(self.program.abstract_batches[kind].values())).shape[0]
        tokens = clips * self.stage.tokens_per_clip(kind)
        values |= self.clock.tick(clips, tokens, slowest["waited"])
        values["replaced"] = float(self.replaced)
        finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
        go_on = finite or self.bad_steps.add(step, kind, values, done.clips)
        if self.config.on_nan == "skip":
            values["skipped"] = float(self.bad_steps.skipped)
        self.goodput.reached(step)
        if step % self.config.log_every == 0 or step == self.config.steps or not finite:
            values["goodput"] = self.goodput.shares()["step"]
            self.writer.write(step, values)
        self.writer.advance(step, values)
        if not finite:
            self.writer.say(
                f"step {step}: loss or gradient is not finite: "
                + ", ".join(f"{k}={v:g}" for k, v in values.items())
            )
        return go_on

    def evaluate(self, state: TrainState) -> dict[str, float]:
        """Mean of the loss terms over the held-out clips, with the same masks each time.

        The last batch is filled up with repeated clips; it counts by its share of real ones.
        """
        with self.goodput.spent("eval"):
            return self._evaluate(state)

    def _evaluate(self, state: TrainState) -> dict[str, float]:
        """`evaluate`, not counting its time."""
        averages: dict[str, clu_metrics.Average] = {}
        with contextlib.closing(self.stage.eval_batches()) as batches:
            for i, batch in enumerate(itertools.islice(batches, self.config.eval_batches or None)):
                self.watchdog.alive(f"evaluating batch {i + 1}")
                valid = self.hosts.share(valid=np.mean(batch.get("valid", 1.0)))
                weight = valid.get()[0]["valid"] / jax.process_count()
                arrays = to_device(batch, self.stage.host_arrays, self.program.mesh)
                key = jax.random.fold_in(self.key, i)
                metrics = self.program.eval_step(state.params, self.frozen, arrays, key)
                for name, value in jax.device_get(metrics).items():
                    one = clu_metrics.Average(total=value * weight, count=np.float32(weight))
                    averages[name] = averages[name].merge(one) if name in averages else one
        values = {name: float(average.compute()) for name, average in averages.items()}
        with self.watchdog.paused("evaluating"):
            values |= self.stage.evaluate(state.params, self.frozen, self.program.mesh)
        if values:
            self.writer.write(int(state.step), values, kind="eval")
        return values

    def save(self, state: TrainState) -> None:
        """Starts an asynchronous checkpoint of `state` and of the position in the data."""
        data = {"next_batch": int(state.step), "replaced": self.replaced}
        self.watchdog.alive("saving")
        with self.goodput.spent("checkpoint"):
            self.checkpointer.save(state, data, self.plain_config)
        self.goodput.write()


def to_device(batch: Any, host_arrays: tuple[str, ...], mesh: Mesh) -> dict[str, jax.Array]:
    """Global device arrays from this process's rows of a batch."""
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(array))
        for name, array in batch.items()
        if name not in host_arrays
    }


def _write_config(workdir: Path, plain_config: dict[str, Any]) -> None:
    """Saves the resolved config beside the run; `iv2 train --config` reads it back."""
    if jax.process_index() == 0:
        storage.write_whole(workdir / "config.json", json.dumps(plain_config, indent=2) + "\n")


def _check_processes(workdir: Path, plain_config: dict[str, Any]) -> None:
    """Refuses processes of one run that were given different things, or do not see one folder."""
    distributed.check_same(
        json.dumps([str(workdir), plain_config], sort_keys=True),
        lambda others: (
            f"processes {others} were given another --config or --workdir than process 0; start "
            "all with the same command, only --process differs"
        ),
    )
    faults.check_shared(workdir)


def _finish(
    config: RunConfig,
    workdir: Path,
    reason: str,
    step: int,
    checkpointer: checkpoint_lib.Checkpointer,
    started: float,
) -> Ending:
    """Waits for the last checkpoint and says how the run ended."""
    saved = checkpointer.wait()
    latest = checkpointer.latest_step()
    checkpointer.close()
    took = f"{(time.monotonic() - started) / 60:.1f} min"
    if reason == "nan":
        text = (
            f"stopped at step {step}: the loss is not finite; the last good checkpoint is step "
            f"{latest} in {workdir}. Lower optimizer.lr or clip_norm, look at the batches in "
            f"{faults.BAD_STEPS}, or set on_nan=skip (max_skipped is {config.max_skipped})."
        )
        return Ending("nan", step, EXIT_NAN, text)
    if not saved or latest != step:
        why = checkpointer.failures[-1] if checkpointer.failures else "unknown"
        text = f"step {step} is not saved ({why}); the last complete checkpoint is step {latest}"
        return Ending("unsaved", step, EXIT_ERROR, text)
    if reason == "stopped":
        text = (
            f"stopped on request at step {step} of {config.steps} after {took}; saved in "
            f"{workdir}, the same command goes on"
        )
        return Ending("stopped", step, EXIT_RESTART, text)
    return Ending("complete", step, EXIT_OK, f"all {step} steps done in {took}; saved in {workdir}")


def read_config(spec: str, overrides: dict[str, str]) -> RunConfig:
    """Reads a config file and the command line's overrides into the stage's run config.

    Raises:
      ConfigError: See `iv2_jax.config`.
    """
    values = config_lib.read_config_file(spec)
    if "stage" not in values:
        raise ConfigError(f"{spec}: config.stage is not set")
    return config_lib.apply_overrides(config_class(values["stage"]), values, overrides)
