"""Every family: PyTorch -> ours -> PyTorch to the bit, through files and checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from iv2_jax.errors import ConfigError
from iv2_jax.interop import entries, export, families, importing, load, run_config
from iv2_jax.models import kinds, zoo
from iv2_jax.train import checkpoint
from tests.interop.family_cases import equal, exported_names, random_params, tiny_names


def test_every_kind_has_a_family_and_a_tiny_model():
    assert set(families.FAMILIES) == set(kinds.KINDS)
    # A model that exists in training alone; `tests/train/test_bridge_stage.py` has a tiny one.
    unnamed = {"bridge_pretraining"}
    assert {zoo.family(name) for name in tiny_names()} == set(kinds.KINDS) - unnamed


def test_every_model_of_the_zoo_is_of_a_kind():
    for name in zoo.names():
        family = families.of(zoo.get(name))
        assert family.name == zoo.family(name)
        assert isinstance(zoo.get(name), family.kind.config_class)


@pytest.mark.parametrize("name", tiny_names())
def test_state_dicts_come_back_to_the_bit(name):
    config = zoo.get(name)
    table = families.of(config).entries(config)
    rng = np.random.default_rng(0)
    tensors = entries.to_torch(random_params(config), table)
    constants = {entry.torch_keys[0] for entry in table if entry.constant is not None}
    whole = {key for entry in table if entry.torch_dtype for key in entry.torch_keys}
    tied = {key for entry in table for key in entry.all_keys if entry.copies}
    for key, value in tensors.items():
        if key not in constants | whole | tied:
            bits = rng.integers(0, 2**32, value.shape, dtype=np.uint32)
            tensors[key] = bits.view(np.float32)  # NaNs of all kinds among them
    back = entries.to_torch(entries.from_torch(tensors, table), table)
    assert list(back) == list(tensors)
    for key, value in tensors.items():
        assert back[key].dtype == value.dtype
        assert back[key].tobytes() == value.tobytes(), key


@pytest.mark.parametrize("name", exported_names())
def test_import_and_export_of_files(name, tmp_path):
    """File -> checkpoint by the streamed import, checkpoint -> folder -> checkpoint."""
    config = zoo.get(name)
    table = families.of(config).entries(config)
    params = random_params(config)
    save_file(entries.to_torch(params, table), tmp_path / "x.safetensors")
    count = importing.import_model(tmp_path / "x.safetensors", name, tmp_path / "ckpt")
    assert count == zoo.count_params(config)
    read, values = checkpoint.load_params(tmp_path / "ckpt")
    prefix = run_config.params_prefix(config).rstrip("/")
    equal(read[prefix] if prefix else read, params)
    found = run_config.read_run(values)
    assert found == (run_config.bare_student(config) if prefix else config)
    folder = export.export_model(
        read, found, tmp_path / "hf", weight_format="hf", shard_bytes=30_000
    )
    importing.import_model(folder, None, tmp_path / "again")
    again, _ = checkpoint.load_params(tmp_path / "again")
    equal(again, read)


def test_teachers_are_never_exported(tmp_path):
    config = zoo.get("test_tiny_videomae")
    with pytest.raises(ConfigError, match="never exported"):
        export.export_model(random_params(config), config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", ["old", "new"])
def test_both_namings_of_peft_are_read(names, tmp_path):

    from iv2_jax.interop.torch_keys import llm
    from iv2_jax.models.lora import LoraConfig

    plain = zoo.get("test_tiny_llm")
    config = plain.with_lora(LoraConfig(rank=2, alpha=4.0), head=True)
    params = random_params(config)
    tensors = entries.to_torch(params, llm.llm_map(config, peft=names))
    save_file(tensors, tmp_path / "x.safetensors")
    opened = load.open_tensors(tmp_path / "x.safetensors")
    read, table = families.of(config).to_read(config, opened)
    equal(entries.from_torch(read, table), params)
