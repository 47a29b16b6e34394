"""Imports weight files as checkpoints: finds the model, streams the tensors, explains misfits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from iv2_jax.errors import ConfigError
from iv2_jax.interop import chat_tokenizer, families, hf_llm, identify, load, run_config, stream
from iv2_jax.interop.entries import MisfitError, from_torch
from iv2_jax.models import zoo

logger = logging.getLogger(__name__)

DTYPES = ("float32", "bfloat16", "float16", "file")


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """What may be asked of an import.

    Attributes:
        wrapper: key the weights stand under in a pickled file; None finds it.
        prefix: take only keys that start so, and take it off.
        ignore: regular expressions of further keys to leave out.
        dtype: of the parameters, one of `DTYPES`; `file` keeps the file's.
        allow_nonfinite: take weights with NaNs or infinities.
        tokenizer: of a chat model, kept with the checkpoint so that `iv2 chat` finds it.
        template: how its chat is written; empty for the released models' own.

    Raises:
        ConfigError: `dtype` is another.
    """

    wrapper: str | None = None
    prefix: str = ""
    ignore: Sequence[str] = ()
    dtype: str = "float32"
    allow_nonfinite: bool = False
    tokenizer: str = ""
    template: str = ""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype={self.dtype!r} must be one of {', '.join(DTYPES)}")


def import_model(
    source: str | Path,
    model: str | None,
    out: str | Path,
    options: ImportOptions = ImportOptions(),
) -> int:
    """Imports PyTorch weights as a checkpoint of step 0; strict, whole or not at all.

    Args:
        source: as in `load.open_tensors`, or a folder that `iv2 export` wrote.
        model: name in the zoo; None for an exported folder and for a language model (Hugging Face
            folder or GGUF file), which say what they hold.
        out: workdir to make.
        options: see `ImportOptions`.

    Returns:
        Number of parameters.

    Raises:
        ConfigError: no model is named where one is needed, or the other way round.
        CheckpointError: the weights cannot be read or do not fit; says what the file seems to be.
    """
    config, path = _what_to_read(Path(source), model)
    family = families.of(config)
    kept = run_config.of_model(config, str(source))
    talk = None
    if options.tokenizer or options.template:
        talk = chat_tokenizer.talk_of(config, model, options.tokenizer, options.template)
        kept["talk"] = chat_tokenizer.saved(talk)
    tensors = load.select(load.open_tensors(path, wrapper=options.wrapper), options.prefix)
    renamed, entries = family.to_read(config, tensors)
    ignore = {**family.ignorable(), **dict.fromkeys(options.ignore, "left out by --ignore")}
    try:
        count = stream.import_tensors(
            renamed,
            entries,
            out,
            kept,
            ignore=ignore,
            dtype=_dtype(options.dtype),
            path_prefix=run_config.params_prefix(config),
            allow_nonfinite=options.allow_nonfinite,
            source=str(path),
        )
    except MisfitError as error:
        what = identify.explain(tensors, model)
        raise MisfitError(f"{error}\n  {what}" if what else str(error)) from error
    if talk is not None:
        chat_tokenizer.copy_files(talk, out)
    return count


def read_exported_model(folder: str | Path) -> tuple[dict[str, Any], Any]:
    """Reads a folder that `iv2 export` wrote, without PyTorch.

    Returns:
        Float32 parameters on the host, and the model's config.

    Raises:
        CheckpointError: the folder is incomplete or its weights do not fit its config.
    """
    config = run_config.read_exported(folder)
    tensors = load.open_tensors(run_config.exported_weights(folder))
    renamed, entries = families.of(config).to_read(config, tensors)
    return from_torch(renamed, entries, dtype=np.float32, source=str(folder)), config


def _what_to_read(source: Path, model: str | None) -> tuple[Any, Path]:
    """The model's config and the file or folder with its weights."""
    if run_config.is_exported(source):
        if model:
            raise ConfigError("--model is not needed: the exported folder says what it holds")
        return run_config.read_exported(source), run_config.exported_weights(source)
    if not model and hf_llm.is_llm_source(source):
        return hf_llm.read_config(source), source
    if not model:
        raise ConfigError("--model must name the model that the file holds; see `iv2 zoo`")
    return zoo.get(model), source


def _dtype(name: str) -> Any:
    """The NumPy dtype of a name; None keeps the file's."""
    import ml_dtypes

    return {"file": None, "bfloat16": np.dtype(ml_dtypes.bfloat16)}.get(name, name)
