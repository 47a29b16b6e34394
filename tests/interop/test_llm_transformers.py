"""Our language models against transformers' Mistral and LLaMA, and against its `generate`."""

from __future__ import annotations

from functools import partial

import jax
import numpy as np
import pytest

from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.llm import llm_map
from iv2_jax.models.decoding import GenerationConfig, edit_scores, sampling_logits
from iv2_jax.models.generate import generate
from iv2_jax.models.llm import Llm
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.rope import RopeConfig
from tests.models import tiny_llm

pytestmark = pytest.mark.torch

torch = pytest.importorskip("torch", reason="needs the torch extra")
transformers = pytest.importorskip(
    "transformers", reason="compares with transformers, which is not installed"
)

SCALING = {
    "none": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.5},
}


def _theirs(config, kind):
    """A tiny random model of transformers, whose tokens differ clearly."""
    decoder = config.decoder
    arguments = {
        "vocab_size": config.vocab_size,
        "hidden_size": decoder.width,
        "intermediate_size": decoder.mlp_width,
        "num_hidden_layers": decoder.depth,
        "num_attention_heads": decoder.num_heads,
        "num_key_value_heads": decoder.num_kv_heads,
        "head_dim": decoder.head_dim,
        "rms_norm_eps": decoder.norm_epsilon,
        "rope_theta": decoder.rope.theta,
        "tie_word_embeddings": config.tied_head,
        "attn_implementation": "eager",
    }
    if kind == "mistral":
        settings = transformers.MistralConfig(**arguments, sliding_window=decoder.sliding_window)
        model = transformers.MistralForCausalLM(settings)
    else:
        settings = transformers.LlamaConfig(
            **arguments,
            rope_scaling=SCALING[decoder.rope.scaling],
            max_position_embeddings=decoder.rope.base_length or 64,
        )
        model = transformers.LlamaForCausalLM(settings)
    weights = torch_keys.to_torch(tiny_llm.params(config), llm_map(config))
    missing = model.load_state_dict(
        {key: torch.from_numpy(value) for key, value in weights.items()}, strict=True
    )
    assert not missing.missing_keys
    return model.eval()


@partial(jax.jit, static_argnames="config")
def _ours(config, params, tokens, **kwargs):
    return Llm(config).apply({"params": params}, tokens, **kwargs)


CASES = {
    "mistral": ("mistral", {}),
    "mistral_window": ("mistral", {"sliding_window": 3}),
    "llama": ("llama", {"num_kv_heads": 4, "norm_epsilon": 1e-6}),
    "llama_linear": ("llama", {"rope": RopeConfig(scaling="linear", factor=4.0)}),
    "llama_dynamic": (
        "llama",
        {"rope": RopeConfig(theta=100.0, scaling="dynamic", factor=2.5, base_length=4)},
    ),
    "llama_tied": ("llama", {"tied_head": True}),
}


@pytest.mark.parametrize("name", CASES)
def test_logits_and_hidden_states(name):
    kind, overrides = CASES[name]
    config = tiny_llm.config(**overrides)
    tokens = tiny_llm.tokens(2, 9)
    out = _ours(config, tiny_llm.params(config), tokens)
    with torch.no_grad():
        theirs = _theirs(config, kind)(torch.from_numpy(tokens).long(), output_hidden_states=True)
    for ours, wanted in ((out.logits, theirs.logits), (out.hidden, theirs.hidden_states[-1])):
        error = np.abs(np.asarray(ours) - wanted.numpy()).max()
        assert error < 1e-5 * np.abs(wanted.numpy()).max()


CONFIG = tiny_llm.config()
SETTINGS = {
    "greedy": {},
    "penalty": {"repetition_penalty": 1.5, "min_new_tokens": 4},
    "beams": {"num_beams": 3},
    "beams_short": {"num_beams": 3, "length_penalty": 0.0, "min_new_tokens": 3},
    "beams_long": {"num_beams": 4, "length_penalty": 2.0, "repetition_penalty": 1.2},
    "beams_early": {"num_beams": 2, "early_stopping": True},
}


@pytest.fixture(scope="module")
def theirs():
    return _theirs(CONFIG, "mistral")


@pytest.mark.parametrize("name", SETTINGS)
def test_generate(name, theirs):
    """Left-padded rows that end at different times, from tokens."""
    mask = np.ones((4, 6), bool)
    mask[0, :2] = mask[2, :1] = False
    tokens = np.where(mask, tiny_llm.tokens(4, 6, seed=7), 22)
    settings = GenerationConfig(
        max_new_tokens=8, eos_ids=(3, 11, 18, 7), pad_id=22, **SETTINGS[name]
    )
    params = tiny_llm.params(CONFIG)
    # transformers counts padding as tokens of the prompt; so does a prompt that has it anyway.
    tokens[:, 4] = 22
    ours = generate(Llm(CONFIG), params, settings, tokens=tokens, mask=mask)
    wanted = theirs.generate(
        torch.from_numpy(tokens).long(),
        attention_mask=torch.from_numpy(mask).long(),
        eos_token_id=list(settings.eos_ids),
        pad_token_id=22,
        do_sample=False,
        max_new_tokens=8,
        use_cache=True,
        **SETTINGS[name],
    )[:, 6:].numpy()
    wanted = np.pad(wanted, ((0, 0), (0, 8 - wanted.shape[1])), constant_values=22)
    np.testing.assert_array_equal(ours.tokens, wanted)
    if settings.length_penalty <= 1:  # a stronger one prefers rows of full length
        assert len(set(np.asarray(ours.lengths).tolist())) > 1


def test_generate_from_embeddings(theirs):
    params = tiny_llm.params(CONFIG)
    embeddings = params["embed"]["embedding"][tiny_llm.tokens(2, 5)]
    settings = GenerationConfig(max_new_tokens=6, eos_ids=(), num_beams=3, repetition_penalty=1.4)
    ours = generate(Llm(CONFIG), params, settings, embeddings=embeddings)
    wanted = theirs.generate(
        inputs_embeds=torch.from_numpy(embeddings),
        attention_mask=torch.ones(2, 5, dtype=torch.long),
        pad_token_id=0,
        eos_token_id=None,
        do_sample=False,
        num_beams=3,
        max_new_tokens=6,
        repetition_penalty=1.4,
    )
    np.testing.assert_array_equal(ours.tokens, wanted.numpy())


def test_edits_of_scores_are_its_processors():
    from transformers.generation import logits_process

    rng = np.random.default_rng(0)
    logits = (3 * rng.normal(size=(16, 40))).astype(np.float32)
    prompt = rng.integers(0, 40, (16, 12))
    seen = np.zeros((16, 40), bool)
    seen[np.arange(16)[:, None], prompt] = True
    config = GenerationConfig(repetition_penalty=1.4, temperature=0.7, top_k=9, top_p=0.8)
    ours = sampling_logits(edit_scores(logits, seen, 0, config), config)
    theirs = torch.from_numpy(logits)
    for processor in (
        logits_process.RepetitionPenaltyLogitsProcessor(1.4),
        logits_process.TemperatureLogitsWarper(0.7),
        logits_process.TopKLogitsWarper(9),
        logits_process.TopPLogitsWarper(0.8),
    ):
        theirs = processor(torch.from_numpy(prompt), theirs)
    np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-5)


def test_adapters_are_pefts(theirs):
    peft = pytest.importorskip("peft", reason="compares with peft, which is not installed")
    config = CONFIG.with_lora(LoraConfig(3, 6.0), head=True)
    params = tiny_llm.params(config)
    targets = [f"{name}_proj" for name in config.decoder.lora_targets] + ["lm_head"]
    adapted = peft.get_peft_model(
        _theirs(CONFIG, "mistral"),
        peft.LoraConfig(r=3, lora_alpha=6.0, target_modules=targets, lora_dropout=0.0),
    ).eval()
    weights = torch_keys.to_torch(params, llm_map(config, peft="new"))
    assert weights.keys() == adapted.state_dict().keys()
    adapted.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    tokens = tiny_llm.tokens(2, 6)
    ours = _ours(config, params, tokens).logits
    with torch.no_grad():
        wanted = adapted(torch.from_numpy(tokens).long()).logits.numpy()
    assert np.abs(np.asarray(ours) - wanted).max() < 1e-5 * np.abs(wanted).max()
    assert config.without_lora() == CONFIG
