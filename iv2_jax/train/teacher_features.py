"""`iv2 data teacher-features`: runs the teachers of a stage-1 config once over all of its clips."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from iv2_jax.data.builders.shards import new_folder
from iv2_jax.data.corpora import open_data
from iv2_jax.data.pipeline import DataConfig, make_loader
from iv2_jax.data.sources import ClipSource
from iv2_jax.data.targets import TargetWriter
from iv2_jax.errors import ConfigError
from iv2_jax.models.teachers import stored
from iv2_jax.parallel.mesh import make_mesh
from iv2_jax.train.distill import DistillConfig, DistillStage
from iv2_jax.train.loop import to_device
from iv2_jax.train.program import put_frozen


def write_teacher_features(
    config: DistillConfig,
    folder: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    progress: Callable[[int], Callable[[], None]] = lambda total: lambda: None,
) -> dict[str, int]:
    """Writes what the teachers give for every clip of `data` and `eval_data`, in float16.

    Each clip is seen in its evaluation view. Runs on the config's mesh, in one process.

    Args:
      config: a stage-1 run.
      folder: folder to make; `config.teacher_features` takes it.
      overwrite: replace the folder if it exists.
      progress: told the number of clips, gives what is called after each.

    Returns:
      Number of clips written by part.

    Raises:
      ConfigError: the clips are augmented at random, or several processes run.
      DataError: clips cannot be read or the folder cannot be written; nothing is left behind.
    """
    if jax.process_count() > 1:
        raise ConfigError("teacher features are written by one process; start one only")
    # The checks of a run that reads them, before hours of work.
    dataclasses.replace(config, teacher_features=os.fspath(folder))
    stage = dataclasses.replace(config, teacher_features="").make_stage()
    parts = {"train": config.data, "eval": config.eval_data}
    sources = {part: _open(data) for part, data in parts.items() if data is not None}
    step = progress(sum(len(source) for source in sources.values()))
    with new_folder(folder, overwrite=overwrite) as temporary:
        writer = TargetWriter(Path(temporary), stage.teacher_settings())
        teach = _Teach(stage)
        written = {
            part: writer.write_part(
                part,
                [clip.id for clip in source.clips],
                teach.rows(parts[part], source),
                step,
            )
            for part, source in sources.items()
        }
        writer.finish()
    return written


def _open(data: DataConfig) -> ClipSource:
    """The clips of a part."""
    return open_data(data)


class _Teach:
    """The teachers on the config's mesh."""

    def __init__(self, stage: DistillStage) -> None:
        """Loads the teachers."""
        self.stage = stage
        self.mesh = make_mesh(stage.config.mesh)
        self.weights = put_frozen(stage, self.mesh)
        self.run = jax.jit(lambda frozen, video: stored.pack(stage.teach(frozen, video)))

    def rows(
        self, data: DataConfig, source: ClipSource
    ) -> Iterator[tuple[int, dict[str, np.ndarray]]]:
        """Position and arrays of each clip that decodes."""
        view: dict[str, Any] = {"eval": True, "fixed_view": False, "mask": "none", "targets": ""}
        view |= {"keep_views": 0, "keep_gb": 0.0}
        config = self.stage.config
        with make_loader(
            dataclasses.replace(data, **view),
            seed=config.seed,
            global_batch=config.batch_size,
            source=source,
        ) as batches:
            for batch in batches:
                video = to_device({"video": batch["video"]}, (), self.mesh)["video"]
                arrays = {k: np.asarray(v) for k, v in self.run(self.weights, video).items()}
                for i in np.flatnonzero(batch["valid"]):
                    yield int(batch["index"][i]), {k: v[i] for k, v in arrays.items()}
