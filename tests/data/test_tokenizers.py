"""Tokenizers: the original's framing and ids, hard input, wrong files; real vocabularies if there.

The vocabularies of most tests are made here, so the expected ids can be read off the test.
"""

from __future__ import annotations

import gzip
import importlib.util
import io
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from iv2_jax.data import tokenizers
from iv2_jax.data.tokenizers import base
from iv2_jax.errors import ConfigError, DataError

tokenizers_library = pytest.importorskip("tokenizers", reason="needs the text extra")

HARD = [
    "",
    "   \t\n ",
    "😀 a 👩‍👩‍👧 family",
    "日本語 text",
    "a" * 5000,
    "word " * 3000,
    "nul \x00 and \u200b and \ufffd",
    "half a pair \ud83d here",
    "<s> </s> [PAD] <unk>",
    "إ é́́́ ΣΑΣ İstanbul",
]


# BERT ---------------------------------------------------------------------------------------------

WORDS = ["a", "man", "is", "riding", "horse", "on", "the", "beach", "cafe", "rid", "##ing", "##s"]
WORDS += [".", ",", "'", "!", "σ", "##ας", "日"]
BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
BERT_ID = {token: index for index, token in enumerate(BERT_TOKENS)}


@pytest.fixture(scope="module")
def vocab(tmp_path_factory):
    path = tmp_path_factory.mktemp("bert") / "vocab.txt"
    path.write_text("\n".join(BERT_TOKENS) + "\n", encoding="utf-8")
    return path


def _bert(path, **options):
    return tokenizers.load("bert", path, **{"vocab_size": None, "max_length": 8} | options)


def _bert_ids(text):
    return [BERT_ID[token] for token in text.split()]


def test_bert_has_cls_and_no_sep(vocab):
    ids, mask = _bert(vocab).encode_batch(["A man is riding.", ""])
    assert ids.dtype == mask.dtype == np.int32
    wanted = _bert_ids("[CLS] a man is riding . [PAD] [PAD]")
    assert ids.tolist() == [wanted, _bert_ids("[CLS]" + " [PAD]" * 7)]
    assert mask.tolist() == [[1] * 6 + [0] * 2, [1] + [0] * 7]


def test_bert_as_stock_and_as_the_q_former_calls_it(vocab):
    stock = _bert(vocab, trailing_sep=True)
    assert stock.encode("a man") == _bert_ids("[CLS] a man [SEP]")
    long = "a man is riding a horse on the beach"
    assert stock.encode(long) == _bert_ids("[CLS] a man is riding a horse [SEP]")
    q_former = _bert(vocab, trailing_sep=True, side="left", extra_tokens=("[DEC]",))
    assert q_former.encode(long) == _bert_ids("[CLS] riding a horse on the beach [SEP]")
    ids, mask = q_former.encode_batch(["a man"])
    assert ids.tolist() == [_bert_ids("[PAD] [PAD] [PAD] [PAD] [CLS] a man [SEP]")]
    assert mask.tolist() == [[0] * 4 + [1] * 4]
    assert q_former.vocab_size == len(BERT_TOKENS) + 1
    assert q_former.tokenize("a [DEC]") == [BERT_ID["a"], len(BERT_TOKENS)]


def test_bert_keeps_one_piece_less_than_the_length(vocab):
    tokenizer = _bert(vocab, max_length=4)
    assert tokenizer.encode("a man is riding") == _bert_ids("[CLS] a man is")
    assert _bert(vocab, max_length=2).encode("a man") == _bert_ids("[CLS] a")


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("CAFÉ", "cafe"),  # lower case, accents stripped
        ("cafe\u0301s", "cafe ##s"),
        ("ridings", "riding ##s"),
        ("man's", "man ' [UNK]"),  # no piece is a lone s
        ("on,the!", "on , the !"),
        ("a日man", "a 日 man"),  # Chinese characters stand apart
        ("ΣΑΣ", "σ ##ας"),  # lowered as a word, so with a final sigma
        ("zebra", "[UNK]"),
        ("a [MASK] man [SEP]", "a [MASK] man [SEP]"),
        ("a [mask]", "a [UNK] [UNK] [UNK]"),
        ("\x00a\u200b man", "a man"),
        ("a" * 101, "[UNK]"),
    ],
)
def test_bert_pieces(vocab, text, pieces):
    tokenizer = _bert(vocab)
    assert tokenizer.tokenize(text) == _bert_ids(pieces)


def test_bert_special_ids_and_decode(vocab):
    tokenizer = _bert(vocab)
    ids = (tokenizer.pad_id, tokenizer.unk_id, tokenizer.cls_id, tokenizer.sep_id)
    assert (*ids, tokenizer.mask_id) == (0, 1, 2, 3, 4)
    assert tokenizer.vocab_size == len(BERT_TOKENS)
    row = tokenizer.encode_batch(["A man is ridings"])[0][0]
    assert tokenizer.decode(row) == "a man is ridings"


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("a\nb\n", r"lacks \[PAD\], \[UNK\], \[CLS\], \[SEP\], \[MASK\]"),
        ("\n".join([*BERT_TOKENS, "man"]), r"line 25: token 'man' stands in line 7 already"),
        ("\n".join([*BERT_TOKENS, "Man"]), r"cased vocabulary \(line 25: 'Man'\)"),
        (b"\xff\xfe\x00", "not a text file in UTF-8"),
        ("", "lacks"),
    ],
)
def test_bert_wrong_files(tmp_path, contents, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(contents if isinstance(contents, bytes) else contents.encode())
    with pytest.raises(DataError, match=message):
        _bert(path)


def test_bert_of_another_size(vocab):
    with pytest.raises(DataError, match=r"24 tokens and the model's table 30522"):
        tokenizers.load("bert", vocab)


def test_bert_takes_windows_line_ends(tmp_path, vocab):
    path = tmp_path / "vocab.txt"
    path.write_bytes(vocab.read_bytes().replace(b"\n", b"\r\n"))
    assert _bert(path).encode("a man") == _bert_ids("[CLS] a man")


# CLIP ---------------------------------------------------------------------------------------------

MERGES = ["r i", "d i", "ri di", "n g</w>", "ridi ng</w>", "a n</w>", "m an</w>", "m a"]
CLIP_SIZE = 512 + len(MERGES) + 2


@pytest.fixture(scope="module")
def merges(tmp_path_factory):
    path = tmp_path_factory.mktemp("clip") / "merges.txt.gz"
    lines = ["#version: 0.2", *MERGES, "not used", "at all"]
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def _clip(path, **options):
    return tokenizers.load("mobileclip", path, **{"vocab_size": CLIP_SIZE} | options)


def _letter(letter, ends=False):
    """Id of a printable ASCII letter; the vocabulary begins with those from "!" on."""
    return ord(letter) - ord("!") + 256 * ends


def test_clip_framing_and_merges(merges):
    tokenizer = _clip(merges, max_length=7)
    start, end = CLIP_SIZE - 2, CLIP_SIZE - 1
    ids, mask = tokenizer.encode_batch(["Riding MAN", "", "x " * 50])
    riding, man = 512 + MERGES.index("ridi ng</w>"), 512 + MERGES.index("m an</w>")
    x = _letter("x", ends=True)
    assert ids.tolist() == [
        [start, riding, man, end, 0, 0, 0],
        [start, end, 0, 0, 0, 0, 0],
        [start, x, x, x, x, x, end],
    ]
    assert mask.sum(axis=1).tolist() == [4, 2, 7]
    # The tower finds the end token by its id, the largest of all.
    assert ids.argmax(axis=1).tolist() == [3, 1, 6]


@pytest.mark.parametrize(
    ("text", "same"),
    [
        ("a  \n man", "a man"),
        ("a &amp;amp; b", "a & b"),
        ("it’s", "it's"),
        ("donâ€™t", "don't"),
        ("A.B", "a . b"),
        ("7up 42", "7 up 4 2"),
    ],
)
def test_clip_cleans_text(merges, text, same):
    tokenizer = _clip(merges)
    assert tokenizer.tokenize(text) == tokenizer.tokenize(same)


def test_clip_text_cannot_write_the_end_token(merges):
    tokenizer = _clip(merges)
    assert max(tokenizer.tokenize("<end_of_text><start_of_text>")) < tokenizer.start_id


def test_clip_decode(merges):
    tokenizer = _clip(merges)
    row = tokenizer.encode_batch(["riding man, é 😀!"])[0][0]
    assert tokenizer.decode(row) == "riding man , é 😀!"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["title", "r i", "d i e"], r"line 3: a merge is two pieces .* not 'd i e'"),
        (["title", "z qq", *MERGES], "do not build on each other: .*qq"),
        (["title", *MERGES[:3]], f"3 merges and the model needs {len(MERGES)}: it is cut off"),
        (["title", *MERGES[:3], ""], f"3 merges and the model needs {len(MERGES)}: it is cut off"),
        ([""], "0 merges"),
    ],
)
def test_clip_wrong_files(tmp_path, lines, message):
    path = tmp_path / "merges.txt"
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError, match=message):
        _clip(path)


def test_clip_damaged_archive(tmp_path, merges):
    path = tmp_path / "merges.txt.gz"
    path.write_bytes(merges.read_bytes()[:-12])
    with pytest.raises(DataError, match="cannot be read as a list of merges"):
        _clip(path)


def test_clip_without_a_path_asks_for_the_package(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match="pip install open_clip_torch"):
        tokenizers.load("mobileclip", None)


# SentencePiece ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A LLaMA-like model: bytes for unknown characters, text kept as it is."""
    sentencepiece = pytest.importorskip("sentencepiece")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["summarize: a man is riding a horse on the beach"] * 9),
        model_writer=written,
        model_type="bpe",
        vocab_size=310,
        byte_fallback=True,
        control_symbols=["[INST]", "[/INST]"],
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    path = tmp_path_factory.mktemp("pieces") / "tokenizer.model"
    path.write_bytes(written.getvalue())
    return path


@pytest.fixture(scope="module")
def processor(model):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_file=str(model))


def _llama_clip(path, **options):
    return tokenizers.load("llama_clip", path, **{"vocab_size": None} | options)


def _chat(path, **options):
    return tokenizers.load("sentencepiece_chat", path, **options)


def test_llama_clip_prompt_framing_and_truncation(model, processor):
    tokenizer = _llama_clip(model, max_length=40)
    ids, mask = tokenizer.encode_batch(["A man", ""])
    wanted = [1, *processor.encode("summarize:A man"), 2]
    assert ids[0].tolist() == wanted + [0] * (40 - len(wanted))
    np.testing.assert_array_equal(mask, ids > 0)
    assert ids[1, : mask[1].sum()].tolist() == [1, *processor.encode("summarize:"), 2]
    short = _llama_clip(model, max_length=6).encode("a man is riding a horse")
    assert short == [1, *processor.encode("summarize:a man is riding a horse")[:4], 2]
    assert tokenizer.decode(ids[0]) == "A man"


def test_llama_clip_never_gives_the_unknown_id(model):
    """The tower counts ids above 0; characters without a piece are spelt in bytes."""
    tokenizer = _llama_clip(model, max_length=80)
    ids, mask = tokenizer.encode_batch(HARD)
    np.testing.assert_array_equal(mask, ids > 0)
    assert tokenizer.decode(tokenizer.encode("😀 日")) == "😀 日"


def test_chat_reads_control_tokens(model, processor):
    tokenizer = _chat(model)
    inst, end = processor.piece_to_id("[INST]"), processor.piece_to_id("[/INST]")
    space = processor.piece_to_id("▁")
    assert processor.is_control(inst)
    ids = tokenizer.tokenize("[INST] a man[/INST]is</s>")
    # No space is put before "is": only a text's very beginning gets one.
    assert ids == [inst, *processor.encode("a man"), end, *_bare(processor, "is"), 2]
    assert tokenizer.tokenize("a man") == tokenizer.tokenize(" a man") == processor.encode("a man")
    assert tokenizer.tokenize(" ") == [space]
    assert tokenizer.encode("a")[0] == tokenizer.bos_id == 1
    assert _chat(model, add_bos=False, add_eos=True).encode("a")[-1] == tokenizer.eos_id == 2
    assert tokenizer.decode(tokenizer.encode("a man[/INST] is</s>")) == "a man is"


def _bare(processor, text):
    """Ids of a text without the space that the model puts first."""
    ids = processor.encode("\n" + text)
    return ids[len(processor.encode("\n")) :]


def test_sentencepiece_wrong_files(tmp_path, model):
    broken = tmp_path / "broken.model"
    broken.write_bytes(b"this is no model")
    truncated = tmp_path / "truncated.model"
    truncated.write_bytes(model.read_bytes()[:-1000])
    for load in (_llama_clip, _chat):
        with pytest.raises(DataError, match="is no SentencePiece model"):
            load(broken)
        with pytest.raises(DataError, match=r"is no SentencePiece model|tokens that begin"):
            load(truncated)
    with pytest.raises(DataError, match=r"310 tokens and the model's table 49954"):
        tokenizers.load("llama_clip", model)
    with pytest.raises(DataError, match=r"310 tokens and the model's table 32768"):
        _chat(model, vocab_size=32768)


# tokenizer.json -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def json_file(tmp_path_factory):
    library = tokenizers_library
    ids = {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 3, "a": 4, "man": 5}
    tokenizer = library.Tokenizer(library.models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = library.pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["<s>", "</s>", "[INST]"])
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding()
    path = tmp_path_factory.mktemp("json") / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_json(json_file):
    tokenizer = tokenizers.load("json", json_file, max_length=6, add_eos=True)
    assert tokenizer.tokenize("[INST]a man a man</s>") == [3, 4, 5, 4, 5, 2]
    ids, mask = tokenizer.encode_batch(["a man", "a man a man a man"])
    assert ids.tolist() == [[1, 4, 5, 2, 0, 0], [1, 4, 5, 4, 5, 2]]
    assert mask.tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6]
    assert tokenizer.decode(ids[0]) == "a man"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 6)


def test_json_wrong_files(tmp_path, json_file):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(DataError, match=r"is no tokenizer\.json"):
        tokenizers.load("json", path)
    with pytest.raises(DataError, match=r"has no token '<\|im_end\|>'"):
        tokenizers.load("json", json_file, eos="<|im_end|>")
    with pytest.raises(DataError, match="6 tokens and the model's table 92544"):
        tokenizers.load("json", json_file, vocab_size=92544)


# All ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["bert", "mobileclip", "llama_clip", "sentencepiece_chat", "json"])
def any_tokenizer(request, vocab, merges, model, json_file):
    paths = {"bert": vocab, "mobileclip": merges, "json": json_file}
    options = {"json": {"max_length": 16}, "sentencepiece_chat": {"max_length": 16}}
    makers = {"bert": _bert, "mobileclip": _clip, "llama_clip": _llama_clip}
    if request.param in makers:
        return makers[request.param](paths.get(request.param, model))
    path = paths.get(request.param, model)
    return tokenizers.load(request.param, path, **options[request.param])


def test_hard_texts(any_tokenizer):
    ids, mask = any_tokenizer.encode_batch(HARD)
    assert ids.shape == mask.shape == (len(HARD), any_tokenizer.max_length)
    assert ids.min() >= 0
    assert ids.max() < any_tokenizer.vocab_size
    lengths = mask.sum(axis=1)
    np.testing.assert_array_equal(mask, np.arange(any_tokenizer.max_length) < lengths[:, None])
    assert (ids[mask == 0] == any_tokenizer.pad_id).all()
    framing = len(any_tokenizer.before) + len(any_tokenizer.after)
    assert lengths[5] == any_tokenizer.max_length
    assert lengths.min() >= framing
    for row, text in enumerate(HARD):  # a row does not depend on the others
        np.testing.assert_array_equal(any_tokenizer.encode_batch([text])[0][0], ids[row])
        assert isinstance(any_tokenizer.decode(ids[row]), str)
    empty = any_tokenizer.encode_batch([])
    assert empty[0].shape == empty[1].shape == (0, any_tokenizer.max_length)


@pytest.mark.parametrize("wrong", [None, 3, float("nan"), b"bytes", ["a"]])
def test_texts_that_are_no_strings(any_tokenizer, wrong):
    with pytest.raises(
        DataError, match=f"text 1: a text must be a string, not {type(wrong).__name__}"
    ):
        any_tokenizer.encode_batch(["a", wrong])
    with pytest.raises(DataError, match="must be a string"):
        any_tokenizer.tokenize(wrong)


@pytest.mark.parametrize("wrong", ["a man", b"a man"])
def test_one_string_is_no_batch(any_tokenizer, wrong):
    with pytest.raises(DataError, match="must be a list of strings"):
        any_tokenizer.encode_batch(wrong)


def test_workers_get_an_equal_copy(any_tokenizer):
    copy = pickle.loads(pickle.dumps(any_tokenizer))
    texts = ["a man is riding a horse", *HARD]
    for ours, theirs in zip(
        any_tokenizer.encode_batch(texts), copy.encode_batch(texts), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


def test_options_are_checked(vocab, merges):
    with pytest.raises(ConfigError, match=r"max_length=1: .* above 1"):
        _bert(vocab, max_length=1)
    with pytest.raises(ConfigError, match=r"max_length=2: .* above 2"):
        _clip(merges, max_length=2)
    with pytest.raises(ConfigError, match=r"max_length=40\.0"):
        _bert(vocab, max_length=40.0)
    with pytest.raises(ConfigError, match="side='middle'"):
        _bert(vocab, side="middle")


@pytest.mark.parametrize("kind", sorted(tokenizers.KINDS))
def test_missing_files(kind, tmp_path):
    with pytest.raises(DataError, match=r"none\.txt does not exist; it should be "):
        tokenizers.load(kind, tmp_path / "none.txt")
    with pytest.raises(DataError, match="is a folder"):
        tokenizers.load(kind, tmp_path)
    if kind != "mobileclip":
        with pytest.raises(DataError, match="give the path of "):
            tokenizers.load(kind, None)


def test_unknown_kind_names_the_nearest():
    with pytest.raises(ConfigError, match="did you mean 'bert'"):
        tokenizers.load("bret", None)


def test_missing_library_says_what_to_install(monkeypatch):
    def missing(name):
        raise ImportError(name)

    monkeypatch.setattr(base.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match=r"package ftfy: pip install 'iv2_jax\[text\]'"):
        base.require_library("ftfy")


def test_no_jax_is_imported(vocab):
    """Loader workers start fast."""
    code = (
        "import sys; from iv2_jax.data import tokenizers; "
        f"tokenizers.load('bert', {str(vocab)!r}, vocab_size=None).encode_batch(['a']); "
        "assert not {'jax', 'flax', 'torch'} & set(sys.modules)"
    )
    repo = Path(__file__).resolve().parents[2]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=repo, timeout=120)


# Real vocabularies --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_clip():
    if importlib.util.find_spec("open_clip") is None:
        pytest.skip("needs the package open_clip_torch, which carries CLIP's merges")
    return tokenizers.load("mobileclip", None)


def test_clip_ids_of_the_real_vocabulary(real_clip):
    assert real_clip.vocab_size == 49408
    assert (real_clip.start_id, real_clip.end_id) == (49406, 49407)
    ids = real_clip.encode("a man is riding a horse")
    assert ids == [49406, 320, 786, 533, 6765, 320, 4558, 49407]
    assert real_clip.encode_batch([""])[0].shape == (1, 77)


@pytest.mark.torch
def test_clip_equals_the_original_tokenizer(real_clip):
    for name in ("torch", "regex"):
        pytest.importorskip(name, reason="the original's tokenizer needs it")
    # From its file: the package itself imports torchvision.
    folder = importlib.util.find_spec("open_clip").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("original", Path(folder) / "tokenizer.py")
    original = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(original)
    theirs = original.SimpleTokenizer()
    rng = np.random.default_rng(0)
    pool = [
        *"abcdefgh ABC  '\t\n.,!?0123&;<>-_",
        "don't ",
        "’s",
        "â€™",
        "&amp;amp;",
        "Σ",
        "é",
        "日",
    ]
    pool += ["😀", "riding ", "n't", " the", "ﬁ", "\u200d", "Ж", "e\u0301", "½", "İ"]
    texts = ["".join(rng.choice(pool, size=rng.integers(0, 90))) for _ in range(300)]
    np.testing.assert_array_equal(real_clip.encode_batch(texts)[0], theirs(texts).numpy())


def _mistral_v3():
    spec = importlib.util.find_spec("mistral_common")
    folders = spec.submodule_search_locations if spec else []
    return [path for folder in folders for path in Path(folder).glob("data/*.model.v3")]


@pytest.mark.parametrize(
    ("text", "bos", "ids"),
    [
        ("[INST] <Video>", True, "1 3 1291 12529 29535"),
        (
            "</Video>[/INST] [INST] What is she wearing? [/INST]",
            True,
            "1 2635 12529 29535 4 29473 3 2592 1117 1398 8960 29572 29473 4",
        ),
        (" [INST] What? [/INST]", False, "29473 3 2592 29572 29473 4"),
        ("She is here.</s>", False, "1753 1117 2004 29491 2"),
        (
            "</Video> [/INST] [INST] Hi [/INST] Yes. </s>",
            False,
            "2635 12529 29535 29473 4 29473 3 16127 29473 4 6360 29491 29473 2",
        ),
        (" [/INST] Best option:(", False, "29473 4 6238 4319 29515 29500"),
        ("Best Option:(", False, "6238 8432 29515 29500"),
    ],
)
def test_chat_ids_of_the_real_vocabulary(text, bos, ids):
    """Ids recorded from the released Chat-8B's fast tokenizer (spec stage3 4.1)."""
    paths = _mistral_v3()
    if not paths:
        pytest.skip("needs the package mistral_common, which carries Mistral v0.3's vocabulary")
    tokenizer = _chat(paths[0], vocab_size=32768)
    found = tokenizer.encode(text) if bos else tokenizer.tokenize(text)
    assert found == list(map(int, ids.split()))
