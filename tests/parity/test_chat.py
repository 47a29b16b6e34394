"""Instruction tuning against the original: prompts, targets, outputs, loss and gradients."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.chat import chat_map
from iv2_jax.models.chat import Chat
from iv2_jax.objectives.next_token import next_token_loss
from tests.parity import chat_goldens, goldens

CASES = ["chat_it_mistral_full", "chat_it_mistral_lora"]


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    return golden(request.param)


def test_prompts_ids_targets_and_mask(case):
    examples, batch, texts = chat_goldens.batch_of(case)
    for index, (prompt, example) in enumerate(zip(case.meta["prompts"], examples, strict=True)):
        # Each piece was given without the spaces around it, which the tokenizer puts there.
        assert texts[index].replace("<Video> </Video>", "<Video></Video>") == prompt
        visual = np.flatnonzero(example.visual_index >= 0)
        before, after = example.tokens[1 : visual[0]], example.tokens[visual[-1] + 1 :]
        np.testing.assert_array_equal(before, case.inputs[f"prompt{index}_before_ids"])
        np.testing.assert_array_equal(after, case.inputs[f"prompt{index}_after_ids"])
        assert example.tokens[0] == case.meta["bos"]
    np.testing.assert_array_equal(batch["targets"], case.outputs["targets"])
    np.testing.assert_array_equal(batch["mask"], case.outputs["attention_mask"])


def test_outputs_loss_and_gradients(case):
    config = chat_goldens.chat_config(case)
    entries = chat_map(config, peft="new")
    params = torch_keys.from_torch(case.weights, entries, source=case.name)
    _, batch, _ = chat_goldens.batch_of(case)
    inputs = {
        "features": case.inputs["vision_feats_BTLC"].reshape(
            len(batch["tokens"]), -1, config.bridge.context_width
        ),
        "bridge_ids": case.inputs["instruction_ids"],
        "bridge_mask": case.inputs["instruction_mask"],
    }

    def loss_fn(params, batch, inputs):
        out = Chat(config).apply(
            {"params": params}, batch["tokens"], batch["visual_index"], batch["mask"], **inputs
        )
        loss, metrics = next_token_loss(out.logits, batch["targets"])
        return loss, (out, metrics)

    (loss, (out, metrics)), grads = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))(
        params, batch, inputs
    )
    limit = goldens.OUTPUT_LIMIT
    goldens.assert_close(out.visual, case.outputs["llm_tokens"], limit, "llm_tokens")
    goldens.assert_close(out.embeddings, case.outputs["inputs_embeds"], limit, "inputs_embeds")
    logits = out.logits * batch["mask"][..., None]  # what is at padding means nothing
    goldens.assert_close(logits, case.outputs["logits"], limit, "logits")
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT
    assert metrics["targets"] == (batch["targets"][:, 1:] >= 0).sum()

    torch_grads = torch_keys.to_torch(grads, entries)
    assert case.grads
    for key, reference in case.grads.items():
        goldens.assert_close(torch_grads[key], reference, goldens.GRAD_LIMIT, f"gradient {key}")
