"""Tokenizers of language models: GGUF, llama2.c, what users type, and text as it streams."""

from __future__ import annotations

import json
import pickle
import struct

import numpy as np
import pytest

from iv2_jax.data import tokenizers
from iv2_jax.data.tokenizers.beside import tokenizer_of
from iv2_jax.data.tokenizers.text_stream import TextStream
from iv2_jax.errors import DataError

library = pytest.importorskip("tokenizers", reason="needs the text extra")
sentencepiece = pytest.importorskip("sentencepiece")

HARD = [
    "",
    "  two  spaces ",
    "日本語 and 😀 👩‍👩‍👧",
    "tab\t\nline",
    "nul \x00",
    "it's 2024",
    "é" * 50,
]
TEXTS = ["a man is riding a horse", "the man's horse", "what is 日本 here?", *HARD] * 4


def _bpe(tmp_path, specials):
    """A byte-level vocabulary trained on a few sentences: tokens, merges."""
    trained = library.Tokenizer(library.models.BPE())
    trained.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = library.decoders.ByteLevel()
    alphabet = library.pre_tokenizers.ByteLevel.alphabet()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    trained.train_from_iterator(TEXTS, trainer)
    trained.save(str(tmp_path / "tokenizer.json"))
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    return trained, tokens, merges


def _spm(tmp_path):
    """A SentencePiece model with bytes and two chat tokens."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in TEXTS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=320,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        control_symbols=["[INST]", "[/INST]"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(str(tmp_path / "tokenizer.model"))


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """The trained tokenizer, and a GGUF file with its vocabulary."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
    folder = tmp_path_factory.mktemp("bpe")
    trained, tokens, merges = _bpe(folder, ["<|end|>", "<|im_start|>", "<|im_end|>"])
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if i < 3 else 1 for i in range(len(tokens))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template("{{ messages }}")
    _close(writer)
    return trained, folder / "x.gguf"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """The trained SentencePiece model, and a GGUF file with its vocabulary."""
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra")
    folder = tmp_path_factory.mktemp("spm")
    trained = _spm(folder)
    count = trained.vocab_size()
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list([trained.id_to_piece(i) for i in range(count)])
    writer.add_token_scores([trained.get_score(i) for i in range(count)])
    kinds = []
    for i in range(count):
        kind = 3 if trained.is_control(i) else 2 if trained.is_unknown(i) else 1
        kinds.append(6 if trained.is_byte(i) else kind)
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    _close(writer)
    return trained, folder / "x.gguf"


def _close(writer):
    """Writes a file of metadata alone."""
    writer.add_tensor("t", np.zeros(1, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("text", [*HARD, "the man", " the man", "<|im_start|>it <|im_end|>"])
def test_gguf_byte_level_is_the_tokenizer_it_was_made_from(byte_level, text):
    trained, path = byte_level
    tokenizer = tokenizers.load("gguf", path)
    assert tokenizer.tokenize(text) == trained.encode(text).ids
    plain = tokenizer.tokenize_plain(text)
    assert tokenizer.decode(plain) == text
    assert not set(plain) & {0, 1, 2}


def test_gguf_options(byte_level):
    tokenizer = tokenizers.load("gguf", byte_level[1], max_length=4, add_bos=True)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (1, 2, 0)
    assert tokenizer.encode("a man is riding a horse")[0] == 1
    assert len(tokenizer.encode("a man is riding a horse")) == 4
    assert tokenizers.load("gguf", byte_level[1]).encode("")[:1] == []
    assert tokenizer.chat_template == "{{ messages }}"
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.tokenize_plain("a <|im_end|>") == tokenizer.tokenize_plain("a <|im_end|>")
    with pytest.raises(DataError, match="belongs to another model"):
        tokenizers.load("gguf", byte_level[1], vocab_size=7)


@pytest.mark.parametrize("text", [*HARD, "the man", " the man", "[INST] a man [/INST] is</s>"])
def test_gguf_pieces_are_those_of_the_sentencepiece_file(pieces, text):
    _, path = pieces
    tokenizer = tokenizers.load("gguf", path)
    chat = tokenizers.load("sentencepiece_chat", path.parent / "tokenizer.model")
    assert tokenizer.encode(text) == chat.encode(text)
    ids = tokenizer.tokenize_plain(text)
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(ids) == text.removeprefix(" ")
    assert ids == chat.tokenize_plain(text)


@pytest.mark.parametrize("kind", ["gguf bytes", "gguf pieces", "json", "sentencepiece_chat"])
def test_what_users_type_is_never_special(kind, byte_level, pieces):
    tokenizer = {
        "gguf bytes": lambda: tokenizers.load("gguf", byte_level[1]),
        "gguf pieces": lambda: tokenizers.load("gguf", pieces[1]),
        "json": lambda: tokenizer_of(byte_level[1].parent, bos="<|im_start|>", eos="<|im_end|>"),
        "sentencepiece_chat": lambda: tokenizer_of(pieces[1].parent),
    }[kind]()
    begin, end = list(tokenizer.specials)[-2:]
    special = set(tokenizer.specials.values())
    # An honest user: as if all were one text.
    parts = [(begin, False), (" what is it?", True), (end, False)]
    assert tokenizer.tokenize_parts(parts) == tokenizer.tokenize(f"{begin} what is it?{end}")
    for typed in (
        end,
        f"{end}{begin}",
        f" stop {end} and {end[:-1]}{end}",
        end[:-1],  # and the template goes on with the last letter
        f"{end[:-1]}{end}{end[1:]}",
    ):
        parts = [(begin, False), (typed, True), (end[-1], False), (end, False)]
        ids = tokenizer.tokenize_parts(parts)
        assert [i for i in ids if i in special] == [tokenizer.specials[n] for n in (begin, end)]
        assert tokenizer.decode(ids).strip() == (typed + end[-1]).strip()
    before = [("the user wrote ", False), (end[1:], True)]
    assert not set(tokenizer.tokenize_parts([("a" + end[0], False), *before[1:]])) & special


def test_gguf_files_without_a_tokenizer(tmp_path):
    gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

    def made(**metadata):
        writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
        for key, value in metadata.items():
            add = {str: writer.add_string, list: writer.add_array, int: writer.add_uint32}
            add[type(value)](f"tokenizer.ggml.{key}", value)
        _close(writer)
        return tmp_path / "x.gguf"

    with pytest.raises(DataError, match="carries no whole tokenizer"):
        tokenizers.load("gguf", made())
    common = {"tokens": ["a", "b"], "bos_token_id": 1, "eos_token_id": 1}
    with pytest.raises(DataError, match="model='bert'"):
        tokenizers.load("gguf", made(**common, model="bert"))
    with pytest.raises(DataError, match=r"pre='tekken' is not known; known: default"):
        tokenizers.load("gguf", made(**common, model="gpt2", pre="tekken", merges=["a b"]))
    with pytest.raises(DataError, match=r"lacks tokenizer.ggml.scores"):
        tokenizers.load("gguf", made(**common, model="llama"))
    with pytest.raises(DataError, match="do not build on each other"):
        tokenizers.load("gguf", made(**common, model="gpt2", pre="default", merges=["a c"]))


def test_tokenizers_beside_weights(tmp_path, byte_level):
    source = byte_level[1].parent / "tokenizer.json"
    (tmp_path / "tokenizer.json").write_bytes(source.read_bytes())
    names = {"bos_token": {"content": "<|im_start|>"}, "eos_token": "<|im_end|>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(names | {"add_bos_token": False}))
    tokenizer = tokenizer_of(tmp_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.before) == (1, 2, ())
    assert tokenizer_of(tmp_path, add_bos=True).before == (1,)
    assert tokenizer_of(byte_level[1]).tokenize("a man") == tokenizer.tokenize("a man")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match=r"tokenizer_config.json cannot be read"):
        tokenizer_of(tmp_path)
    with pytest.raises(DataError, match=r"no folder with tokenizer.json or tokenizer.model"):
        tokenizer_of(tmp_path / "nothing")


def test_llama2c_tokenizer(tmp_path, pieces):
    """The same pieces and scores give the ids of the SentencePiece model they come from."""
    trained = pieces[0]
    raw = struct.pack("<i", 99)
    for i in range(trained.vocab_size()):
        piece = ("<unk>", "\n<s>\n", "\n</s>\n")[i] if i < 3 else trained.id_to_piece(i)
        data = piece.replace("\u2581", " ").encode()
        raw += struct.pack("<fi", trained.get_score(i), len(data)) + data
    (tmp_path / "tok.bin").write_bytes(raw)
    tokenizer = tokenizers.load("llama2c", tmp_path / "tok.bin")
    chat = tokenizers.load("sentencepiece_chat", pieces[1].parent / "tokenizer.model")
    for text in [*HARD, "the man's horse"]:
        ids = tokenizer.encode(text)
        assert ids == chat.encode(text)
        assert tokenizer.decode(ids) == text.removeprefix(" ")
    assert not {1, 2} & set(tokenizer.tokenize_plain("<s> </s>"))
    (tmp_path / "tok.bin").write_bytes(raw[:-2])
    with pytest.raises(DataError, match=r"no tokenizer of llama2.c"):
        tokenizers.load("llama2c", tmp_path / "tok.bin")


# Text as it streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gguf bytes", "gguf pieces", "sentencepiece_chat"])
@pytest.mark.parametrize("chunk", [1, 3])
def test_streamed_text_is_the_whole_text_and_never_a_broken_letter(kind, chunk, byte_level, pieces):
    path = byte_level[1] if kind == "gguf bytes" else pieces[1]
    tokenizer = tokenizer_of(path.parent if kind == "sentencepiece_chat" else path)
    for text in [*HARD, "a 👩‍👩‍👧 family, 日本語"]:
        ids = tokenizer.tokenize_plain(text)
        stream, shown = TextStream(tokenizer), []
        for start in range(0, len(ids), chunk):
            shown.append(stream.push(ids[start : start + chunk]))
        assert "\ufffd" not in "".join(shown)
        assert "".join(shown) == tokenizer.decode(ids)
        assert stream.close() == ""


def test_a_letter_that_never_ends_comes_at_the_end(byte_level):
    tokenizer = tokenizers.load("gguf", byte_level[1])
    ids = tokenizer.tokenize_plain("ok 😀")[:-1]
    stream = TextStream(tokenizer)
    shown = "".join(stream.push([index]) for index in ids)
    assert shown == "ok "
    assert shown + stream.close() == tokenizer.decode(ids)
    assert stream.push(tokenizer.tokenize_plain(" x")).endswith(" x")  # broken inside: shown
