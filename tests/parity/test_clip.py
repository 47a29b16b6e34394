"""The CLIP models against the original: outputs, intermediates, loss and gradients."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.clip import clip_map
from iv2_jax.models.clip import Clip, ClipConfig, SmallClipConfig
from iv2_jax.models.llm_layers import DecoderConfig
from iv2_jax.models.lora import LoraConfig
from iv2_jax.models.rope import RopeConfig
from iv2_jax.models.text.llama_clip import LlamaClipConfig
from iv2_jax.models.text.mobileclip import MobileClipConfig
from iv2_jax.objectives.contrastive import contrastive_loss, similarity
from tests.parity import goldens

CASES = [
    "clip_llama_lora",
    "clip_llama_nolora_seppos",
    "clip_small_mobileclip_causal",
    "clip_small_mobileclip_bidir",
]
# Near-cancelling sums, for which the goldens' README allows more.
LOOSE = {
    ("clip_llama_nolora_seppos", "vision_encoder.clip_projector.cross_attn.proj.bias"): 1e-4,
} | {(name, "temp"): 1e-4 for name in CASES}


@pytest.fixture(scope="module", params=CASES)
def case(request, golden):
    return golden(request.param)


def clip_config(case):
    """The model of a case, from the constructor arguments in its header."""
    vision = dataclasses.replace(
        goldens.encoder_config(case.meta["vision_ctor"]),
        layer_scale_init=case.meta["vision_ctor"]["init_values"],
        image_positions="shared",
    )
    if "llama" in case.meta:
        return ClipConfig(vision, _llama(case))
    return SmallClipConfig(vision, _mobileclip(case))


def _llama(case):
    """Text tower of a `clip_llama_*` case."""
    llama, lora = case.meta["llama"], case.meta["lora"]
    assert llama["hidden_act"] == "silu"
    config = LlamaClipConfig(
        vocab_size=llama["vocab_size"],
        decoder=DecoderConfig(
            width=llama["hidden_size"],
            depth=llama["num_hidden_layers"],
            num_heads=llama["num_attention_heads"],
            num_kv_heads=llama["num_key_value_heads"],
            mlp_width=llama["intermediate_size"],
            norm_epsilon=llama["rms_norm_eps"],
            rope=RopeConfig(theta=llama["rope_theta"]),
        ),
        out_width=case.weights["text_encoder.text_projection"].shape[1],
    )
    if lora is None:
        return config
    targets = tuple(target.removesuffix("_proj") for target in lora["targets"].split(","))
    return config.with_lora(LoraConfig(lora["r"], lora["alpha"]), targets)


def _mobileclip(case):
    """Text tower of a `clip_small_*` case."""
    text = case.meta["text_cfg"]["text_cfg"]
    depth, heads = text["n_transformer_layers"], text["n_heads_per_layer"]
    factors = text["ffn_multiplier_per_layer"]
    return MobileClipConfig(
        vocab_size=text["vocab_size"],
        context_length=text["context_length"],
        width=text["dim"],
        mlp_widths=tuple(
            math.ceil(text["dim"] * factor / 16) * 16 for factor in _every(factors, depth)
        ),
        num_heads=tuple(_every(heads, depth)),
        out_width=case.meta["text_cfg"]["embed_dim"],
        causal=text["causal_masking"],
    )


def _every(value, depth):
    """One value a layer."""
    return value if isinstance(value, list) else [value] * depth


def _video(array):
    """`(B, T, 3, H, W)` as channels last."""
    return array.transpose(0, 1, 3, 4, 2)


def test_outputs_loss_and_gradients(case):
    config = clip_config(case)
    entries = clip_map(config)
    params = torch_keys.from_torch(case.weights, entries, source=case.name)
    inputs = {name: jnp.asarray(value) for name, value in case.inputs.items()}

    def loss_fn(params, video, text, idx):
        out = Clip(config).apply({"params": params}, video, text)
        return contrastive_loss(out.vision, out.text, out.temperature, idx), out

    grad = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, out), grads = grad(params, _video(inputs["video"]), inputs["text"], inputs["idx"])
    named = {
        "vision_embeds": out.vision,
        "text_embeds": out.text,
        "sim_v2t": similarity(out.vision, out.text, out.temperature),
    }
    for name, value in named.items():
        goldens.assert_close(value, case.outputs[name], goldens.OUTPUT_LIMIT, name)
    assert abs(loss - case.loss) < goldens.LOSS_LIMIT

    torch_grads = torch_keys.to_torch(grads, entries)
    assert case.grads
    for key, reference in case.grads.items():
        limit = LOOSE.get((case.name, key), goldens.GRAD_LIMIT)
        goldens.assert_close(torch_grads[key], reference, limit, f"gradient {key}")


def test_named_intermediates(case):
    config = clip_config(case)
    params = {"params": torch_keys.from_torch(case.weights, clip_map(config))}
    model = Clip(config)

    @jax.jit
    def text(params, ids):
        return model.apply(params, ids, return_layers=(0,), method="encode_text")

    out = text(params, case.inputs["text"])
    ours = {"text_layer0": out.features[0], "text_embeds": out.pooled}
    if "text_all_tokens" in case.outputs:
        ours["text_all_tokens"] = out.tokens
    for name, length in _short_texts(case):
        ours[name] = text(params, case.inputs["text"][1:, :length]).pooled
    if "text_last_hidden" in case.outputs:
        # Recorded with zeros at padding.
        real = (case.inputs["text"] > 0)[..., None]
        ours["text_last_hidden"] = np.where(real, out.tokens, 0)
        ours["text_layer0"] = np.where(real, ours["text_layer0"], 0)
    if "vision_block0" in case.outputs:
        ours["vision_block0"] = _first_block(model, params, _video(case.inputs["video"]))
    if "image" in case.inputs:
        image = _video(case.inputs["image"])
        ours["image_embeds"] = model.apply(params, image, method="encode_vision")
    assert ours.keys() | {"vision_embeds", "sim_v2t"} == case.outputs.keys()
    for name, value in ours.items():
        goldens.assert_close(value, case.outputs[name], goldens.OUTPUT_LIMIT, name)


def _short_texts(case):
    """Outputs of texts cut short, with their length: positions are resized for them."""
    names = [name for name in case.outputs if name.startswith("text_embeds_len")]
    return [(name, int(name.removeprefix("text_embeds_len"))) for name in names]


def _first_block(model, params, video):
    """Residual stream after the video encoder's first block."""
    return model.apply(
        params, video, method=lambda m, v: m.vision_encoder(v, return_layers=(0,)).features[0]
    )


@pytest.mark.torch
def test_our_pytorch_modules(case):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    from iv2_jax.interop.torch_models import clip as torch_models

    config = clip_config(case)
    kind = "clip" if isinstance(config, ClipConfig) else "clip_small"
    model = torch_models.from_config({"kind": kind, "model": config_lib.to_dict(config)})
    # Strict, with the original's own names: nothing missing, nothing left over.
    model.load_state_dict({k: torch.from_numpy(v.copy()) for k, v in case.weights.items()})
    inputs = {k: torch.from_numpy(v.copy()) for k, v in case.inputs.items()}
    out = model(inputs["video"].transpose(1, 2), inputs["text"])
    named = {
        "vision_embeds": out.vision,
        "text_embeds": out.text,
        "sim_v2t": out.similarity,
    }
    if "image" in inputs:
        named["image_embeds"] = model.encode_vision(inputs["image"].transpose(1, 2))
    for name, length in _short_texts(case):
        named[name] = model.encode_text(inputs["text"][1:, :length])
    for name, value in named.items():
        goldens.assert_close(value.detach(), case.outputs[name], goldens.OUTPUT_LIMIT, name)

    equal = (inputs["idx"][:, None] == inputs["idx"]).float()
    targets = equal / equal.sum(dim=1, keepdim=True)
    scores = out.similarity
    both = [(targets * s.log_softmax(dim=1)).sum(dim=1).mean() for s in (scores, scores.T)]
    loss = -sum(both) / 2
    loss.backward()
    assert abs(loss.item() - case.loss) < goldens.LOSS_LIMIT
    gradients = {name: value.grad for name, value in model.named_parameters()}
    for key, reference in case.grads.items():
        limit = LOOSE.get((case.name, key), goldens.GRAD_LIMIT)
        goldens.assert_close(gradients[key], reference, limit, f"gradient {key}")
