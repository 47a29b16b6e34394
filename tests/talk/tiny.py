"""A checkpoint of a tiny chat model: random weights, the real vocabulary of Mistral v0.3."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from flax.core import meta

from iv2_jax import config as config_lib
from iv2_jax.data.instruct.sequence import SequenceConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.interop.load import save_checkpoint
from iv2_jax.models import chat as chat_lib
from iv2_jax.models import kinds
from tests.data.instruct.words import mistral_file

CONTEXT = 192
CONFIG = dataclasses.replace(
    chat_lib.ZOO["test_tiny_chat"],
    llm=dataclasses.replace(
        chat_lib.ZOO["test_tiny_chat"].llm, vocab_size=32768, context_length=CONTEXT
    ),
)


def params(config=CONFIG, seed: int = 0) -> dict:
    """Random parameters, visual tokens large enough to matter; the initialiser is not compiled."""
    tree = jax.eval_shape(partial(kinds.of(config).init_params, config), jax.random.key(0))
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(
        lambda leaf: (0.2 * rng.normal(size=leaf.shape)).astype("f4"), meta.unbox(tree)
    )
    drawn["bridge"]["project_up"]["kernel"] *= 20
    return drawn


def tokenizer_folder(folder: Path) -> Path:
    """A folder with Mistral's `tokenizer.model`; skips where the package is missing."""
    folder.mkdir(exist_ok=True)
    shutil.copy(mistral_file(), folder / "tokenizer.model")
    return folder


def talk(tokenizer: Path, **changes) -> TalkConfig:
    """How the tiny model is talked to."""
    sequence = SequenceConfig("mistral_v3", 128, tokens_per_view=CONFIG.bridge.num_tokens)
    values = {"frames": 2, "size": 28, "instruction": "Watch."} | changes
    return TalkConfig(str(tokenizer), sequence, **values)


def checkpoint(folder: Path, talk_config: TalkConfig | None = None, config=CONFIG) -> Path:
    """A workdir whose config holds `talk`, as a run of stage 3 or an import writes it."""
    save_checkpoint(params(config), config, folder, source="tests")
    if talk_config is not None:
        path = folder / "checkpoints" / "0" / "config" / "metadata"
        values = json.loads(path.read_text())
        path.write_text(json.dumps(values | {"talk": config_lib.to_dict(talk_config)}))
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """Folder of the tokenizer."""
    return tokenizer_folder(tmp_path_factory.mktemp("tokenizer") / "mistral")
