"""BERT's key table and PyTorch modules: the original's names, tied copies, exact round trips."""

from __future__ import annotations

import dataclasses
import gzip
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util

from iv2_jax import config as config_lib
from iv2_jax.errors import CheckpointError
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.text import HEAD, IGNORABLE, bert_map
from iv2_jax.models import kinds
from iv2_jax.models.text.bert import ZOO, Bert
from tests.interop.family_cases import check_round_trip, random_tree

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests" / "text"
LARGE = ZOO["bert_large_stage2_1b"]
TINY = ZOO["test_tiny_bert"]
BARE = dataclasses.replace(TINY, mlm_head=False)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("bert_stage2_visual_1B", LARGE),
        ("bert_stage2_visual_1B_retmode", dataclasses.replace(LARGE, mlm_head=False)),
    ],
)
def test_keys_and_shapes_are_the_originals(name, config):
    manifest = json.loads(gzip.decompress((MANIFESTS / f"{name}.json.gz").read_bytes()))
    ours = torch_keys.torch_shapes(bert_map(config, key_prefix="text_encoder."))
    assert ours == {key: tuple(shape) for key, (shape, _) in manifest.items()}


def test_shipped_manifests_are_the_text_part_of_the_originals(shared_dir):
    for mode in ("", "_retmode"):
        whole = json.loads(
            (shared_dir / f"manifests/multi_stage2_visual_1B{mode}.json").read_text()
        )
        text = {k: v for k, v in whole.items() if k.startswith("text_encoder.")}
        path = MANIFESTS / f"bert_stage2_visual_1B{mode}.json.gz"
        assert json.loads(gzip.decompress(path.read_bytes())) == text


def test_the_audiovisual_tower_differs_in_the_context_alone(shared_dir):
    whole = json.loads((shared_dir / "manifests/multi_stage2_audiovisual_6B.json").read_text())
    wanted = {k: tuple(v[0]) for k, v in whole.items() if k.startswith("text_encoder.")}
    config = ZOO["bert_large_stage2_6b"]
    assert torch_keys.torch_shapes(bert_map(config, key_prefix="text_encoder.")) == wanted


@pytest.mark.parametrize(("name", "count"), [("1b", 360_108_858), ("6b", 353_555_258)])
def test_parameter_counts_are_the_published_ones(name, count):
    params = torch_keys.abstract_params(bert_map(ZOO[f"bert_large_stage2_{name}"]))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count


@pytest.mark.parametrize(
    "config",
    [*ZOO.values(), BARE, dataclasses.replace(TINY, fusion_layer=TINY.depth)],
    ids=[*ZOO, "bare", "no fusion"],
)
def test_paths_and_shapes_are_the_modules(config):
    ours = torch_keys.abstract_params(bert_map(config))
    module = kinds.of(config).abstract_params(config)
    flat = [traverse_util.flatten_dict(tree, sep="/") for tree in (ours, module)]
    assert {k: v.shape for k, v in flat[0].items()} == {k: v.shape for k, v in flat[1].items()}


@pytest.mark.parametrize("config", [TINY, BARE], ids=["head", "bare"])
def test_round_trip_is_exact(config):
    entries = bert_map(config, path_prefix="text_encoder/", key_prefix="text_encoder.")
    params = random_tree(entries)
    check_round_trip(params, entries)


def test_fusion_layers_are_numbered_from_the_fusion_layer_on():
    entries = bert_map(TINY)
    params = random_tree(entries)
    tensors = torch_keys.to_torch(params, entries)
    value = params["fusion_layers"]["cross_attn"]["v"]["kernel"]
    key = f"bert.encoder.layer.{TINY.fusion_layer}.crossattention.self.value.weight"
    np.testing.assert_array_equal(tensors[key][16 + 3], value[0, :, 1, 3])
    assert not any(f"layer.{TINY.fusion_layer - 1}.crossattention" in key for key in tensors)


@pytest.fixture
def state():
    """Entries, parameters and a state dict that fits them."""
    entries = bert_map(TINY)
    params = random_tree(entries)
    return entries, params, torch_keys.to_torch(params, entries)


def test_exports_write_position_ids_and_tied_copies(state):
    _, params, tensors = state
    np.testing.assert_array_equal(
        tensors["bert.embeddings.position_ids"], np.arange(TINY.max_length)[None]
    )
    assert tensors["bert.embeddings.position_ids"].dtype == np.int64
    np.testing.assert_array_equal(
        tensors["cls.predictions.decoder.weight"], params["embeddings"]["word"]
    )
    np.testing.assert_array_equal(tensors["cls.predictions.decoder.bias"], params["head"]["bias"])


@pytest.mark.parametrize(
    "missing",
    [
        ["bert.embeddings.position_ids"],
        ["cls.predictions.decoder.weight", "cls.predictions.decoder.bias"],
        ["bert.embeddings.word_embeddings.weight", "cls.predictions.bias"],
    ],
)
def test_imports_do_not_need_the_copies(state, missing):
    entries, params, tensors = state
    left = {key: value for key, value in tensors.items() if key not in missing}
    jax.tree.map(np.testing.assert_array_equal, params, torch_keys.from_torch(left, entries))


def test_a_table_without_any_copy_is_missing(state):
    entries, _, tensors = state
    del tensors["bert.embeddings.word_embeddings.weight"]
    del tensors["cls.predictions.decoder.weight"]
    with pytest.raises(CheckpointError, match=r"1 missing:\n +bert.embeddings.word_embeddings"):
        torch_keys.from_torch(tensors, entries)


def test_copies_that_differ_are_refused(state):
    entries, _, tensors = state
    tensors["cls.predictions.decoder.weight"] = tensors["cls.predictions.decoder.weight"] + 1
    with pytest.raises(CheckpointError, match=r"cls\.predictions\.decoder\.weight"):
        torch_keys.from_torch(tensors, entries)


def test_heads_of_the_bare_release_are_left_out_by_name(state):
    entries, params, tensors = state
    extra = tensors | {
        "bert.pooler.dense.weight": np.zeros((2, 2)),
        "cls.seq_relationship.bias": np.zeros(2),
    }
    got = torch_keys.from_torch(extra, entries, ignore=IGNORABLE)
    jax.tree.map(np.testing.assert_array_equal, params, got)
    with pytest.raises(CheckpointError, match="2 unexpected"):
        torch_keys.from_torch(extra, entries)


def test_a_model_without_head_reads_a_pretraining_file(state):
    _, params, tensors = state
    bare = {key.removeprefix("bert."): value for key, value in tensors.items()}
    got = torch_keys.from_torch(bare, bert_map(BARE), ignore=HEAD)
    np.testing.assert_array_equal(got["embeddings"]["word"], params["embeddings"]["word"])
    assert "head" not in got


@pytest.mark.torch
@pytest.mark.parametrize("config", [TINY, BARE], ids=["head", "bare"])
def test_torch_modules_give_our_outputs(config):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import text

    entries = bert_map(config)
    params = jax.tree.map(lambda x: 0.3 * x, random_tree(entries))
    model = text.from_config({"kind": "bert", "model": config_lib.to_dict(config)})
    tensors = torch_keys.to_torch(params, entries)
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in tensors.items()})

    rng = np.random.default_rng(1)
    ids = rng.integers(0, config.vocab_size, (2, 7))
    mask = np.array([[1] * 7, [1] * 4 + [0] * 3])
    context = rng.normal(size=(2, 5, config.context_width)).astype(np.float32)
    context_mask = np.array([[1] * 5, [1, 1, 0, 0, 0]])
    bound = Bert(config).bind({"params": params})
    theirs = model(*map(torch.from_numpy, (ids, mask, context, context_mask)))
    ours = bound(ids, mask, context, context_mask)
    pairs = {"all layers": (ours, theirs)}
    text_only = torch.from_numpy(ids), torch.from_numpy(mask)
    pairs["text"] = bound.encode_text(ids, mask), model.encode_text(*text_only)
    if config.mlm_head:
        pairs["logits"] = bound.mlm_logits(ours), model.mlm_logits(theirs)
    for name, (ours, theirs) in pairs.items():
        ours, theirs = np.asarray(ours), theirs.detach().numpy()
        assert np.abs(ours - theirs).max() < 1e-5 * np.abs(ours).max(), name


@pytest.mark.torch
def test_another_kind_is_refused():
    pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import text

    with pytest.raises(ValueError, match="'bert'"):
        text.from_config({"kind": "student", "model": {}})
