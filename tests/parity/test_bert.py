"""BERT against the original: every mode, the masked-LM head, loss and gradients."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.text import bert_map
from iv2_jax.models.text.bert import Bert, BertConfig
from tests.parity import goldens


def bert_config(ctor: dict, **options: object) -> BertConfig:
    """Our config of the original's constructor arguments."""
    assert ctor.pop("hidden_act") == "gelu"
    assert ctor.pop("pad_token_id") == 0
    names = {
        "vocab_size": "vocab_size",
        "hidden_size": "width",
        "num_hidden_layers": "depth",
        "num_attention_heads": "num_heads",
        "intermediate_size": "mlp_width",
        "max_position_embeddings": "max_length",
        "type_vocab_size": "token_types",
        "layer_norm_eps": "epsilon",
        "hidden_dropout_prob": "dropout_rate",
        "attention_probs_dropout_prob": "attention_dropout_rate",
        "fusion_layer": "fusion_layer",
        "encoder_width": "context_width",
    }
    return BertConfig(**{names[name]: value for name, value in ctor.items()}, **options)


@pytest.fixture(scope="module")
def case(golden):
    return golden("s2_bert")


@pytest.fixture(scope="module")
def model(case):
    """The module and its parameters."""
    config = bert_config(dict(case.meta["ctor"]))
    params = torch_keys.from_torch(case.weights, bert_map(config), source=case.name)
    return Bert(config), params


def test_text(case, model):
    bert, params = model
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]

    @jax.jit
    def run(variables):
        embedded = bert.apply(variables, ids, method=lambda m, ids: m.embeddings(ids))
        return embedded, bert.apply(
            variables, ids, mask, return_layers=(0, -1), method="encode_text"
        )

    embedded, (hidden, features) = run({"params": params})
    ours = {
        "text/embeddings": embedded,
        "text/layer0": features[0],
        "text/last_hidden": hidden,
    }
    for name, value in ours.items():
        goldens.assert_close(value, case.outputs[name], goldens.OUTPUT_LIMIT, name)
    assert (features[1] == hidden).all()


def test_fusion_and_multi_modal(case, model):
    bert, params = model
    ids, mask, context, context_mask = (
        case.inputs[name]
        for name in ("input_ids", "attention_mask", "vision_embeds", "vision_attention_mask")
    )

    @jax.jit
    def run(variables):
        hidden = bert.apply(variables, ids, mask, method="encode_text")
        fuse = bert.bind(variables).fuse
        return {
            "fusion/last_hidden_padded_vision": fuse(hidden, mask, context, context_mask),
            "fusion/last_hidden_full_vision": fuse(hidden, mask, context),
            "multi_modal/last_hidden": bert.apply(variables, ids, mask, context, context_mask),
        }

    for name, value in run({"params": params}).items():
        goldens.assert_close(value, case.outputs[name], goldens.OUTPUT_LIMIT, name)


def test_masked_lm(case, model):
    bert, params = model
    inputs = case.inputs

    def loss_fn(params):
        bound = bert.bind({"params": params})
        hidden = bound(
            inputs["masked_input_ids"], inputs["attention_mask"], inputs["vision_embeds"]
        )
        logits = bound.mlm_logits(hidden)
        labels = jnp.asarray(inputs["mlm_labels"])
        log_probs = jax.nn.log_softmax(logits)
        picked = jnp.take_along_axis(log_probs, jnp.maximum(labels, 0)[..., None], axis=-1)[..., 0]
        kept = labels != -100
        return -jnp.sum(picked * kept) / jnp.sum(kept), logits

    (loss, logits), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(params)
    goldens.assert_close(logits, case.outputs["mlm/logits"], goldens.OUTPUT_LIMIT, "logits")
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT
    torch_grads = torch_keys.to_torch(grads, bert_map(bert.config))
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(torch_grads[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


@pytest.mark.torch
def test_torch_modules(case):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import text

    config = bert_config(dict(case.meta["ctor"]))
    bert = text.from_config({"kind": "bert", "model": config_lib.to_dict(config)})
    # Strict, with the original's own names: nothing missing, nothing left over.
    bert.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights.items()})
    inputs = {k: torch.from_numpy(v.copy()) for k, v in case.inputs.items()}
    ids, mask, context = (inputs[k] for k in ("input_ids", "attention_mask", "vision_embeds"))
    hidden = bert.encode_text(ids, mask)
    padded = inputs["vision_attention_mask"]
    fused = bert(inputs["masked_input_ids"], mask, context)
    logits = bert.mlm_logits(fused)
    pairs = {
        "text/last_hidden": hidden,
        "fusion/last_hidden_padded_vision": bert.fuse(hidden, mask, context, padded),
        "fusion/last_hidden_full_vision": bert.fuse(hidden, mask, context),
        "multi_modal/last_hidden": bert(ids, mask, context, padded),
        "mlm/logits": logits,
    }
    for name, value in pairs.items():
        goldens.assert_close(value.detach(), case.outputs[name], goldens.OUTPUT_LIMIT, name)

    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), inputs["mlm_labels"].flatten())
    loss.backward()
    gradients = dict(bert.named_parameters())
    for key, reference in case.grads.items():
        gradient = gradients[key].grad
        goldens.assert_close(gradient, reference, goldens.GRAD_LIMIT, f"gradient {key}")
