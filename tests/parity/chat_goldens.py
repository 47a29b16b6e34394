"""Configs and prompts of the chat cases from their headers."""

from __future__ import annotations

import re

from iv2_jax.data import dialogue as dlg
from iv2_jax.data.instruct.conversations import Conversation, Medium, Turn
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig, TokenSequence
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.models.bridge import BridgeConfig
from iv2_jax.models.chat import ChatConfig
from tests.parity import llm_cases
from tests.parity.goldens import Golden

TEMPLATE = "mistral_v2"


class CaseWords(LlmTokenizer):
    """The case's own words as tokens; keeps the texts it was given."""

    def __init__(self, meta: dict) -> None:
        """Reads the ids of a case's header."""
        self.words, self.texts = meta["token_ids"], []
        self.bos_id, self.eos_id = meta["bos"], self.words["</s>"]
        self.specials = {"</s>": self.eos_id}
        super().__init__(max_length=4096, vocab_size=1 << 20, pad_id=meta["pad"])

    def _ids(self, text: str) -> list[int]:
        self.texts.append(text)
        return [self.words[word] for word in re.findall(r"</?Video>|\S+?(?=<|\s|$)", text)]

    def decode(self, ids: list[int]) -> str:
        """Words joined by spaces."""
        names = {index: word for word, index in self.words.items()}
        return " ".join(names[int(index)] for index in ids)


def bridge_config(golden: Golden) -> BridgeConfig:
    """Bridge of a `chat_qformer_*` or `chat_it_*` case; the text side is read from the weights."""
    meta, ctor = golden.meta, dict(golden.meta["qformer"])
    assert ctor.pop("hidden_act") == "gelu"
    ctor.pop("pad_token_id")
    config = BridgeConfig(
        context_width=ctor.pop("encoder_width"),
        llm_width=len(golden.weights["mistral_proj.bias"]),
        num_queries=meta["num_query"],
        num_extra_queries=meta["num_extra_query"],
        text="qformer.bert.embeddings.word_embeddings.weight" in golden.weights,
        width=ctor.pop("hidden_size"),
        depth=ctor.pop("num_hidden_layers"),
        num_heads=ctor.pop("num_attention_heads"),
        mlp_width=ctor.pop("intermediate_size"),
        cross_every=ctor.pop("cross_attention_freq"),
        vocab_size=ctor.pop("vocab_size"),
        max_length=ctor.pop("max_position_embeddings"),
        epsilon=ctor.pop("layer_norm_eps"),
        dropout_rate=ctor.pop("hidden_dropout_prob"),
        attention_dropout_rate=ctor.pop("attention_probs_dropout_prob"),
    )
    assert not ctor, f"{golden.name}: unknown Q-Former arguments {sorted(ctor)}"
    return config


def chat_config(golden: Golden) -> ChatConfig:
    """Model of a `chat_it_*` case: the encoder's features are given, and the released mistake of
    the first position is on.
    """
    llm = llm_cases.llm_config(golden.meta["mistral"])
    if golden.meta["lora"] is not None:
        llm = llm_cases.with_lora(llm, golden.meta["lora"], set(golden.weights))
    return ChatConfig(None, bridge_config(golden), llm, bos_as_number=True)


def parse(prompt: str) -> Conversation:
    """A conversation from the original's string, written independently of the templates."""
    head, _, tail = prompt.partition("<Video></Video>")
    message, _, tail = tail.partition(" [/INST]")
    instruction = head.strip().removesuffix("[INST]").strip()
    turns = []
    for answered in tail.split("</s>")[:-1]:
        question, _, answer = answered.rpartition("[/INST]")
        question = question.strip().removeprefix("[INST]").strip()
        turns.append(Turn(question, answer.strip(), instruction))
    return Conversation(tuple(turns), (Medium("video", "a.mp4"),), message=message)


def batch_of(case: Golden) -> tuple[list[TokenSequence], dict, list[str]]:
    """Rows of the case's prompts as our collator makes them, and each prompt's text."""
    meta, count = case.meta, case.meta["num_query"] + case.meta["num_extra_query"]
    examples, texts = [], []
    for prompt in meta["prompts"]:
        tokenizer = CaseWords(meta)
        config = SequenceConfig(TEMPLATE, max_length=4096, tokens_per_view=count)
        examples.append(SequenceBuilder(config, tokenizer).build(parse(prompt)))
        texts.append(" ".join(tokenizer.texts))
    longest = max(example.length for example in examples)
    length = min(longest, meta["max_txt_len"] + count)
    return examples, dlg.pad_batch(examples, length, meta["pad"]), texts
