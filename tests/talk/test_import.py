"""`iv2 import --tokenizer`: a chat model that is imported with what it takes to talk to it."""

from __future__ import annotations

import shutil

import pytest
from safetensors.numpy import save_file

from iv2_jax import cli
from iv2_jax.errors import ConfigError
from iv2_jax.interop import entries
from iv2_jax.interop.importing import ImportOptions, import_model
from iv2_jax.interop.torch_keys.chat import chat_map
from iv2_jax.models import chat as chat_lib
from iv2_jax.talk.model import open_model
from tests.talk import tiny

TINY = chat_lib.ZOO["test_tiny_chat"]


def _words(folder):
    """A folder with a tokenizer of a few words, as Hugging Face keeps one."""
    library = pytest.importorskip("tokenizers", reason="needs the extra `text`")
    names = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]", "a", "b", "<Video>", "</Video>"]
    made = library.Tokenizer(
        library.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>")
    )
    made.pre_tokenizer = library.pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(names[:5])
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    (folder / "notes.txt").write_text("not a tokenizer's")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """The tiny chat model in the original's names."""
    path = tmp_path_factory.mktemp("weights") / "chat.safetensors"
    save_file(entries.to_torch(tiny.params(TINY), chat_map(TINY)), path)
    return path


def test_no_flags_are_needed_later(weights, tmp_path):
    folder, out = _words(tmp_path / "mistral"), tmp_path / "run"
    command = ["import", "--from", str(weights), "--model", "test_tiny_chat", "--out", str(out)]
    assert cli.main([*command, "--tokenizer", str(folder), "--template", "mistral_v3"]) == 0
    assert [path.name for path in (out / "tokenizer").iterdir()] == ["tokenizer.json"]
    shutil.rmtree(folder)
    moved = shutil.move(out, tmp_path / "elsewhere")
    for path in (moved, f"{moved}/checkpoints/0"):
        model = open_model(str(path))
        assert model.talk.sequence.template == "mistral_v3"
        assert (model.talk.frames, model.talk.size) == (2, 28)
        assert model.talk.tokenizer == str(tmp_path / "elsewhere" / "tokenizer")
        assert model.tokenizer.tokenize_plain("a b") == [5, 6]


def test_what_does_not_fit_is_said_before_anything_is_read(weights, tmp_path):
    folder = _words(tmp_path / "words")
    for options, message in (
        (ImportOptions(tokenizer=str(folder)), "--tokenizer needs --template"),
        (ImportOptions(template="mistral_v3"), "--template needs --tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            import_model(weights, "test_tiny_chat", tmp_path / "run", options)
    large = tiny.tokenizer_folder(tmp_path / "large")
    options = ImportOptions(tokenizer=str(large), template="mistral_v3")
    with pytest.raises(ConfigError, match="has 32768 tokens, the model 61: it is another model's"):
        import_model(weights, "test_tiny_chat", tmp_path / "run", options)
    options = ImportOptions(tokenizer=str(folder), template="mistral_v3")
    with pytest.raises(ConfigError, match="are for chat models; leave them out"):
        import_model(weights, "test_tiny", tmp_path / "run", options)
    assert not (tmp_path / "run").exists()
