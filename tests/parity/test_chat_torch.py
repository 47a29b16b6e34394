"""Our PyTorch bridge and dialogue model on the original's own state dicts and outputs."""

from __future__ import annotations

import pytest

from iv2_jax import config as config_lib
from tests.parity import chat_goldens, goldens

pytestmark = pytest.mark.torch


def _tensors(torch, arrays):
    return {key: torch.from_numpy(value.copy()) for key, value in arrays.items()}


@pytest.mark.parametrize("name", ["chat_qformer_text", "chat_qformer_notext"])
def test_bridge(golden, name):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import bridge as torch_models

    case = golden(name)
    config = chat_goldens.bridge_config(case)
    contents = {"kind": "bridge", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents)
    # Strict, with the original's own names: nothing missing, nothing left over.
    model.load_state_dict(_tensors(torch, case.weights))
    inputs = _tensors(torch, case.inputs)
    out = model(
        inputs["vision_feats"], inputs.get("instruction_ids"), inputs.get("instruction_mask")
    )
    limit = goldens.OUTPUT_LIMIT
    goldens.assert_close(out.tokens.detach(), case.outputs["llm_tokens"], limit, "tokens")
    goldens.assert_close(out.hidden.detach(), case.outputs["last_hidden"], limit, "hidden")
    ((out.tokens * torch.linspace(-1, 1, config.llm_width)) ** 2).mean().backward()
    gradients = {name: value.grad for name, value in model.named_parameters()}
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(gradients[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")


@pytest.mark.parametrize("name", ["chat_it_mistral_full", "chat_it_mistral_lora"])
def test_chat(golden, name):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import chat as torch_models

    case = golden(name)
    config = chat_goldens.chat_config(case)
    contents = {"kind": "chat", "model": config_lib.to_dict(config)}
    model = torch_models.from_config(contents)
    # Our modules have the names of peft up to 0.5, which the release needs; the case newer ones.
    weights = {key.replace(".base_layer.", "."): value for key, value in case.weights.items()}
    model.load_state_dict(_tensors(torch, weights))
    inputs = _tensors(torch, case.inputs)
    batch = _tensors(torch, chat_goldens.batch_of(case)[1])
    features = inputs["vision_feats_BTLC"].flatten(1, 2)[:, None]
    with torch.no_grad():
        out = model(
            batch["tokens"].long(),
            batch["visual_index"].long(),
            batch["mask"],
            features=features,
            bridge_ids=inputs["instruction_ids"],
            bridge_mask=inputs["instruction_mask"],
        )
    limit = goldens.OUTPUT_LIMIT
    goldens.assert_close(out.visual, case.outputs["llm_tokens"], limit, "llm_tokens")
    goldens.assert_close(out.embeddings, case.outputs["inputs_embeds"], limit, "inputs_embeds")
    logits = out.logits * batch["mask"][..., None]
    goldens.assert_close(logits, case.outputs["logits"], limit, "logits")
