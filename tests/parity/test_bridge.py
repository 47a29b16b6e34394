"""The Q-Former bridge against the original: outputs, intermediates, loss and gradients."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.chat import bridge_map
from iv2_jax.models.bridge import Bridge
from iv2_jax.models.layers import LayerNorm
from tests.parity import chat_goldens, goldens

CASES = ["chat_qformer_text", "chat_qformer_notext"]


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    return golden(request.param)


def _text(case):
    """Instruction and its mask, or twice None."""
    return case.inputs.get("instruction_ids"), case.inputs.get("instruction_mask")


def test_outputs_loss_and_gradients(case):
    config = chat_goldens.bridge_config(case)
    assert config.text == ("instruction_ids" in case.inputs)
    params = torch_keys.from_torch(case.weights, bridge_map(config), source=case.name)

    def loss_fn(params, features):
        out = Bridge(config).apply({"params": params}, features, *_text(case))
        scale = jnp.linspace(-1.0, 1.0, config.llm_width)
        return jnp.mean((out.tokens * scale) ** 2), out

    (loss, out), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, case.inputs["vision_feats"]
    )
    goldens.assert_close(out.tokens, case.outputs["llm_tokens"], goldens.OUTPUT_LIMIT, "tokens")
    goldens.assert_close(out.hidden, case.outputs["last_hidden"], goldens.OUTPUT_LIMIT, "hidden")
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT
    torch_grads = torch_keys.to_torch(grads, bridge_map(config))
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(torch_grads[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


def test_named_intermediates(case):
    config = chat_goldens.bridge_config(case)
    features, (ids, mask) = case.inputs["vision_feats"], _text(case)

    def first_layers(depth):
        """Bridge of the first layers alone, and its parameters."""
        shallow = dataclasses.replace(config, depth=depth)
        entries = bridge_map(shallow)
        known = torch_keys.torch_shapes(entries)
        weights = {key: value for key, value in case.weights.items() if key in known}
        return Bridge(shallow), {"params": torch_keys.from_torch(weights, entries)}

    bridge, params = first_layers(1)
    embedded = bridge.apply(params, len(features), ids, method="embed")
    goldens.assert_close(embedded, case.outputs["embeddings"], goldens.OUTPUT_LIMIT, "embeddings")
    norm = LayerNorm(config.context_width, config.epsilon)
    normed = norm.apply({"params": params["params"]["vision_norm"]}, features)
    goldens.assert_close(normed, case.outputs["vision_ln"], goldens.OUTPUT_LIMIT, "vision_ln")
    for depth, name in ((1, "layer0"), (2, "layer1")):
        bridge, params = first_layers(depth)
        out = jax.jit(bridge.apply)(params, features, ids, mask)
        goldens.assert_close(out.hidden, case.outputs[name], goldens.OUTPUT_LIMIT, name)
