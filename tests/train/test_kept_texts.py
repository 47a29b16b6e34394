"""Captions' features computed once: the same losses as computing them at every step."""

from __future__ import annotations

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from iv2_jax.errors import ConfigError
from iv2_jax.train import checkpoint as checkpoint_lib
from iv2_jax.train import loop
from iv2_jax.train.init_towers import TowerInit
from iv2_jax.train.kept_texts import KeptTexts
from tests.train import tiny_align

CONTRASTS = {"weights": {"vtc": 1.0, "avtc": 0.5, "avc": 0.3}, "captions": {"avtc": "avs"}}
FROZEN = {"lr": 1e-3, "scale_lr_by_batch": False, "freeze": ["text_encoder/.*"]}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A run that starts from the weights of another, its text tower frozen."""
    folder = tmp_path_factory.mktemp("kept")
    fields = {"eval_data": None, "retrieval": {"enabled": False}, "optimizer": FROZEN}
    words = {"mask_id": 4, "special_ids": [0, 2]}
    config = tiny_align.config(
        folder, ("audio_video",), loss=CONTRASTS | {"words": words}, steps=1, **fields
    )
    loop.train(config, folder / "first")
    init = (TowerInit("model", str(folder / "first")),)
    return dataclasses.replace(config, init=init, keep_texts=True)


def _losses(config, params):
    stage = config.make_stage()
    loss = jax.jit(stage.loss_fn, static_argnames="train")
    found = []
    with contextlib.closing(stage.train_batches(0)) as batches:
        for _, batch in zip(range(2), batches, strict=False):
            arrays = {k: v for k, v in batch.items() if k not in stage.host_arrays}
            kinds = stage.abstract_batches(config.batch_size)
            assert {k: np.shape(v) for k, v in arrays.items()} == {
                k: v.shape for k, v in kinds["audio_video"].items()
            }
            terms = loss(params, {}, arrays, jax.random.key(1), train=False)[1]
            found.append({name: float(value) for name, value in terms.items()})
    return found


def test_losses_are_those_of_the_tower(config):
    params, _ = checkpoint_lib.load_params(config.init[0].path)
    every_time = _losses(dataclasses.replace(config, keep_texts=False), params)
    kept = _losses(config, params)
    assert len(kept) == 2
    for one, other in zip(kept, every_time, strict=True):
        assert one == pytest.approx(other, rel=1e-5)


def test_a_caption_is_computed_once(config):
    stage = config.make_stage()
    texts = KeptTexts(config.stage2.text, stage.starting_params()["text_encoder"], 0)
    ids = np.array([[1, 7, 2, 0], [1, 8, 2, 0], [1, 7, 2, 0]], np.int32)
    first = texts.features(ids)
    assert len(texts) == 2
    np.testing.assert_array_equal(first[0], first[2])
    texts._params = None  # nothing is computed any more
    np.testing.assert_array_equal(texts.features(ids[::-1]), first[::-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"init": ()}, "needs the text tower's weights"),
        ({"frozen_towers_in_train_mode": True}, "dropout"),
        ({"loss": {"weights": {"vtc": 1.0, "vtm": 1.0}}}, "'vtm' reads every word"),
    ],
)
def test_what_cannot_be_kept_is_refused(config, changes, message):
    loss = changes.pop("loss", None)
    if loss:
        changes["loss"] = dataclasses.replace(config.loss, **loss)
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(config, **changes)


def test_a_tower_that_is_trained_is_refused(config):
    optimizer = dataclasses.replace(config.optimizer, freeze=())
    with pytest.raises(ConfigError, match="is trained; freeze"):
        dataclasses.replace(config, optimizer=optimizer).make_stage()
