"""The language model against the original: logits, window, greedy tokens, adapters, gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.llm import llm_map
from iv2_jax.models import lora
from iv2_jax.models.generate import GenerationConfig, generate
from iv2_jax.models.llm import Llm
from tests.parity import goldens, llm_cases


@pytest.fixture(scope="module")
def case(golden):
    return golden("chat_mistral")


@pytest.fixture(scope="module")
def config(case):
    return llm_cases.llm_config(case.meta["ctor"])


@pytest.fixture(scope="module")
def params(case, config):
    return llm_cases.llm_params(case.weights, config, case.name)


def _next_token_loss(logits, tokens):
    logits, targets = jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:]
    return -jnp.mean(jnp.take_along_axis(logits, targets[..., None], axis=-1))


def test_logits_loss_intermediates_and_gradients(case, config, params):
    def loss_fn(params, tokens):
        out = Llm(config).apply({"params": params}, tokens, return_layers=(0,))
        return _next_token_loss(out.logits, tokens), out

    (loss, out), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, case.inputs["input_ids"]
    )
    for name, ours in {
        "logits": out.logits,
        "layer0": out.features[0],
        "last_hidden": out.hidden,
    }.items():
        goldens.assert_close(ours, case.outputs[name], goldens.OUTPUT_LIMIT, name)
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT
    torch_grads = torch_keys.to_torch(grads, llm_map(config))
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(torch_grads[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


def test_embeddings_and_sliding_window(case, config, params):
    out = Llm(config).apply({"params": params}, embeddings=case.inputs["inputs_embeds"])
    name = "logits_inputs_embeds"
    goldens.assert_close(out.logits, case.outputs[name], goldens.OUTPUT_LIMIT, name)

    windows = [name for name in case.outputs if name.startswith("logits_sliding_window")]
    assert windows
    for name in windows:
        decoder = dataclasses.replace(
            config.decoder, sliding_window=int(name.removeprefix("logits_sliding_window"))
        )
        model = Llm(dataclasses.replace(config, decoder=decoder))
        out = model.apply({"params": params}, case.inputs["input_ids"])
        goldens.assert_close(out.logits, case.outputs[name], goldens.OUTPUT_LIMIT, name)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("greedy8", {"tokens": "input_ids"}),
        ("greedy8_left_padded", {"tokens": "left_padded_ids", "mask": "left_padded_mask"}),
        ("greedy8_inputs_embeds", {"embeddings": "inputs_embeds"}),
    ],
    ids=["tokens", "left_padded", "embeddings"],
)
def test_greedy_tokens_are_exact(case, config, params, name, prompt):
    wanted = case.outputs[name]
    settings = GenerationConfig(max_new_tokens=wanted.shape[1], eos_ids=())
    inputs = {argument: jnp.asarray(case.inputs[key]) for argument, key in prompt.items()}
    out = generate(Llm(config), params, settings, **inputs)
    np.testing.assert_array_equal(out.tokens, wanted)
    np.testing.assert_array_equal(out.lengths, wanted.shape[1])


def test_adapters_apart_and_merged(case, config, params):
    prefix = "lora/"
    adapters = {k.removeprefix(prefix): v for k, v in case.inputs.items() if k.startswith(prefix)}
    adapted = llm_cases.with_lora(config, case.meta["lora"], set(adapters))
    assert adapted.decoder.lora.scale == case.meta["lora"]["scaling"]
    tensors = {f"base_model.model.{k}": v for k, v in (case.weights | adapters).items()}
    whole = llm_cases.llm_params(tensors, adapted, case.name)
    tokens = case.inputs["input_ids"]

    apart = Llm(adapted).apply({"params": whole}, tokens).logits
    name = "logits_lora_unmerged"
    goldens.assert_close(apart, case.outputs[name], goldens.OUTPUT_LIMIT, name)

    merged = lora.merge(whole, adapted.decoder.lora)
    assert adapted.without_lora() == config
    joined = Llm(config).apply({"params": merged}, tokens).logits
    name = "logits_lora_merged"
    goldens.assert_close(joined, case.outputs[name], goldens.OUTPUT_LIMIT, name)

    back = lora.unmerge(merged, lora.split(whole)[1], adapted.decoder.lora)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), back, whole)


@pytest.mark.torch
def test_torch_module(case, config):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import llm as torch_llm

    module = torch_llm.from_config({"kind": "llm", "model": config_lib.to_dict(config)})
    module.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights.items()})
    tokens = torch.from_numpy(case.inputs["input_ids"])
    out = module(tokens)
    goldens.assert_close(
        out.logits.detach(), case.outputs["logits"], goldens.OUTPUT_LIMIT, "logits"
    )
    loss = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    )
    assert abs(loss.item() - case.loss) < goldens.LOSS_LIMIT
    loss.backward()
    gradients = {name: value.grad for name, value in module.named_parameters()}
    for key, reference in case.grads.items():
        goldens.assert_close(gradients[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")
    for suffix in ("", "_left_padded", "_inputs_embeds"):
        wanted = case.outputs[f"greedy8{suffix}"]
        mask = None
        if suffix == "_inputs_embeds":
            embeddings = torch.from_numpy(case.inputs["inputs_embeds"])
        else:
            key = "left_padded_ids" if suffix else "input_ids"
            embeddings = torch_llm.embed(module, torch.from_numpy(case.inputs[key]))
        if suffix == "_left_padded":
            mask = torch.from_numpy(case.inputs["left_padded_mask"])
        got = module.greedy(embeddings.detach(), wanted.shape[1], mask=mask)
        np.testing.assert_array_equal(got, wanted)
