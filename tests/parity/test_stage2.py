"""The stage-2 models against the original: features, every loss, gradients, re-ranking scores."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from iv2_jax import config as config_lib
from iv2_jax.data import fbank
from iv2_jax.interop import torch_keys
from iv2_jax.interop.torch_keys.stage2 import stage2_map
from iv2_jax.models.masking import mask_to_visible
from iv2_jax.models.stage2 import Stage2, TextFeatures, join_tokens
from iv2_jax.objectives.contrastive import clamp_temperature, contrastive_loss, similarity
from iv2_jax.objectives.distillation import alignment_loss, final_loss
from iv2_jax.objectives.masked_lm import masked_lm_loss
from iv2_jax.objectives.matching import matching_batch, matching_loss, negative_weights
from tests.parity import goldens
from tests.parity.stage2_goldens import channels_last, stage2_config, stage2_params

TEMP_GRAD_LIMIT = 1e-4  # a near-cancelling sum, see the goldens' README


@pytest.fixture(scope="module")
def visual(golden):
    return golden("s2_visual_all_losses")


@pytest.fixture(scope="module")
def audiovisual(golden):
    return golden("s2_audiovisual_all_losses")


def _judge(model, text, tokens, negatives, corrupted, media="video"):
    """Logits `(3B, 2)` of the pairs and their wrong partners, and of the words, in one pass."""
    pairs = matching_batch(tokens, text.hidden, text.mask, *negatives)
    hidden = (tokens, corrupted, text.mask)
    fused = model.fuse(*(jnp.concatenate(both) for both in zip(pairs, hidden, strict=True)))
    batch = len(text.hidden)
    return model.match_logits(fused[: 3 * batch], media), model.word_logits(fused[3 * batch :])


def _encode_texts(model, ids, corrupted, mask):
    """Features of the texts, and the hidden states of each corrupted version of them."""
    versions = [ids, *corrupted]
    text = model.encode_text(
        jnp.concatenate(versions), jnp.concatenate([jnp.asarray(mask)] * len(versions))
    )
    hidden = jnp.split(text.hidden, len(versions))
    return TextFeatures(hidden[0], mask, text.joint[: len(ids)]), hidden[1:]


def _contrast(model, a, b, ids):
    return contrastive_loss(a, b, clamp_temperature(model.temp), ids)


def _negatives(inputs, media, text):
    return inputs[media], inputs[text]


def _visual_batch(model, case, kind):
    """Unweighted losses and intermediates of the video or the image batch."""
    inputs, targets = case.inputs, case.outputs
    out = model.encode_vision(
        jnp.asarray(channels_last(inputs[kind])), mask_to_visible(inputs[f"{kind}_mask"])
    )
    mask, ids = inputs["attention_mask"], inputs["idx"]
    corrupted_ids = inputs[f"{kind}_mlm_input_ids"]
    text, (corrupted,) = _encode_texts(model, inputs["input_ids"], [corrupted_ids], mask)
    scores = similarity(out.joint, text.joint, clamp_temperature(model.temp))
    negatives = _negatives(inputs, f"{kind}_vision_neg_idx", f"{kind}_text_neg_idx")
    matched, guessed = _judge(model, text, out.tokens, negatives, corrupted)
    named = {
        "vision_embeds": out.tokens,
        "pooled": out.pooled,
        "clip_middle": out.aligned,
        "clip_final": out.aligned_final,
        "vision_proj": out.joint,
        "text_proj": text.joint,
        "sim_v2t": scores,
        "vtm_weights_t2v": negative_weights(scores.T, ids),
        "vtm_weights_v2t": negative_weights(scores, ids),
        "vtm_logits": matched,
        "mlm_logits": guessed,
    }
    ratios = case.meta["clip_loss_ratio"]
    losses = {
        "vtc": _contrast(model, out.joint, text.joint, ids),
        "vtm": matching_loss(matched),
        "mlm": masked_lm_loss(guessed, inputs[f"{kind}_mlm_labels"]),
    }
    if case.meta["loss_weight"].get("uta"):
        middle, final = (targets[f"{kind}/teacher_{x}"] for x in ("middle_visible", "final"))
        aligned = alignment_loss(out.aligned, middle), final_loss(out.aligned_final, final)
        losses["uta"] = ratios[0] * aligned[0] + ratios[1] * aligned[1]
    return losses, named


def _weighted(case, losses):
    """Losses times their weights; the weights are the header's."""
    weights = {name: weight for name, weight in case.meta["loss_weight"].items() if weight}
    assert weights.keys() <= losses.keys()
    return {name: weight * losses[name] for name, weight in weights.items()}


def _check(case, named, prefix=""):
    for name, value in named.items():
        reference = case.outputs[f"{prefix}{name}"]
        if name.startswith("loss_"):
            assert abs(value - reference) < goldens.LOSS_LIMIT, f"{prefix}{name}"
        else:
            goldens.assert_close(value, reference, goldens.OUTPUT_LIMIT, f"{prefix}{name}")


def _check_gradients(case, config, grads):
    torch_grads = torch_keys.to_torch(grads, stage2_map(config))
    assert case.grads
    for key, reference in case.grads.items():
        limit = TEMP_GRAD_LIMIT if key == "temp" else goldens.GRAD_LIMIT
        goldens.assert_close(torch_grads[key], reference, limit, f"gradient {key}")


class TestVisual:
    """The 1B layout: a video batch and an image batch."""

    def test_losses_intermediates_and_gradients(self, visual):
        case, config = visual, stage2_config(visual)

        def run(model):
            batches = {kind: _visual_batch(model, case, kind) for kind in ("video", "image")}
            named = {
                f"{kind}/{name}": value
                for kind, (_, values) in batches.items()
                for name, value in values.items()
            }
            total = 0.0
            for kind, (losses, _) in batches.items():
                weighted = _weighted(case, losses)
                total += sum(weighted.values())
                named |= {f"{kind}/loss_{name}": value for name, value in weighted.items()}
            return total, named

        def loss_fn(params):
            return Stage2(config).apply({"params": params}, method=run)

        step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (loss, named), grads = step(stage2_params(case, config))
        for kind in ("video", "image"):
            prefix = f"{kind}/"
            values = {k.removeprefix(prefix): v for k, v in named.items() if k.startswith(prefix)}
            for name, value in values.items():
                if name.startswith("loss_"):
                    reference = case.outputs[prefix + name]
                    assert abs(value - reference) < goldens.LOSS_LIMIT, prefix + name
                else:
                    _check(case, {name: value}, prefix)
        assert abs(loss - case.loss) < goldens.LOSS_LIMIT
        _check_gradients(case, config, grads)

    def test_evaluation_and_reranking(self, visual):
        case, config = visual, stage2_config(visual)
        inputs = case.inputs

        def run(model):
            vision = model.encode_vision(jnp.asarray(channels_last(inputs["video"])))
            text = model.encode_text(inputs["input_ids"], inputs["attention_mask"])
            videos, texts = len(vision.tokens), len(text.hidden)
            tokens = jnp.repeat(vision.tokens, texts, axis=0)
            hidden, mask = (
                jnp.tile(x, (videos,) + (1,) * (x.ndim - 1)) for x in (text.hidden, text.mask)
            )
            logits = model.match_logits(model.fuse(tokens, hidden, mask))
            logits = logits[:, 1].reshape(videos, texts)
            return {
                "vision_embeds": vision.tokens,
                "pooled_vision": vision.pooled,
                "pooled_text": text.hidden[:, 0],
                "sim_v2t": similarity(vision.joint, text.joint),
                "itm_match_logit": logits,
            }

        params = {"params": stage2_params(case, config)}
        _check(case, jax.jit(lambda p: Stage2(config).apply(p, method=run))(params), "eval/")


class TestAudiovisual:
    """The 6B layout: ten losses of videos with sound and one caption."""

    @staticmethod
    def _run(model, case):
        inputs = case.inputs
        mask, ids = inputs["attention_mask"], inputs["idx"]
        visible = mask_to_visible(inputs["video_mask"])
        vision = model.encode_vision(jnp.asarray(channels_last(inputs["video"])), visible)
        audio, parts = model.encode_audio(inputs["fbank"]), model.config
        versions = [inputs[f"{media}mlm_input_ids"] for media in ("", "a", "av")]
        text, corrupted = _encode_texts(model, inputs["input_ids"], versions, mask)
        both = model.fuse_joint(audio.joint, vision.joint) if parts.av_fusion else None
        tokens = {
            "": vision.tokens,
            "a": audio.tokens,
            "av": join_tokens(audio.tokens, vision.tokens),
        }
        names = {"": "vtm", "a": "atm", "av": "avtm"}
        heads = {"": "video", "a": "audio", "av": "audiovisual"}
        losses = {
            "vtc": _contrast(model, vision.joint, text.joint, ids),
            "atc": _contrast(model, audio.joint, text.joint, ids),
            "avc": _contrast(model, audio.joint, vision.joint, ids),
        }
        named = {}
        if parts.av_fusion:
            losses["avtc"] = _contrast(model, both, text.joint, ids)
            named["av_fusion"] = both
        for (media, name), hidden in zip(names.items(), corrupted, strict=True):
            negatives = _negatives(inputs, f"{name}_media_neg_idx", f"{name}_text_neg_idx")
            # A head that a case has no loss for does not exist; any stands in.
            head = heads[media] if case.meta["loss_weight"].get(name) else "video"
            logits, guessed = _judge(model, text, tokens[media], negatives, hidden, head)
            if head == heads[media]:
                named[f"{name}_logits"] = logits
                losses[name] = matching_loss(logits)
            losses[f"{media}mlm"] = masked_lm_loss(guessed, inputs[f"{media}mlm_labels"])
        weighted = _weighted(case, losses)
        named |= {
            "text_proj": text.joint,
            "vision_embeds_av": vision.tokens,
            "vision_proj": vision.joint,
            "audio_embeds_av": audio.tokens,
            "audio_proj": audio.joint,
            **{f"loss_{name}": value for name, value in weighted.items()},
        }
        return sum(weighted.values()), named

    def test_ten_losses_intermediates_and_gradients(self, audiovisual):
        case, config = audiovisual, stage2_config(audiovisual)

        def loss_fn(params):
            return Stage2(config).apply({"params": params}, case, method=self._run)

        step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
        (loss, named), grads = step(stage2_params(case, config))
        _check(case, named)
        weights = case.meta["loss_weight"]
        assert {n.removeprefix("loss_") for n in named if n.startswith("loss_")} == {
            name for name, weight in weights.items() if weight
        }
        assert all(case.outputs[f"loss_{n}"] == 0 for n, weight in weights.items() if not weight)
        assert abs(loss - case.loss) < goldens.LOSS_LIMIT
        _check_gradients(case, config, grads)

    def test_evaluation(self, audiovisual):
        case, config = audiovisual, stage2_config(audiovisual)

        def run(model):
            vision = model.encode_vision(jnp.asarray(channels_last(case.inputs["video"])))
            audio = model.encode_audio(case.inputs["fbank"])
            return {
                "vision_embeds": vision.tokens,
                "pooled_vision": vision.pooled,
                "audio_embeds": audio.tokens,
                "pooled_audio": audio.pooled,
            }, model.audio_encoder(case.inputs["fbank"]).tokens

        params = {"params": stage2_params(case, config)}
        named, tokens = jax.jit(lambda p: Stage2(config).apply(p, method=run))(params)
        _check(case, named, "eval/")
        _check(case, {"beats_features": tokens})

    def test_fbank(self, audiovisual):
        ours = fbank.fbank(audiovisual.inputs["waveform"])
        assert np.abs(ours - audiovisual.outputs["fbank_from_waveform"]).max() < 2e-4


def _torch_model(torch, case):
    """Our PyTorch modules with the case's weights, loaded strictly."""
    from iv2_jax.interop.torch_models import stage2

    contents = {"kind": "stage2", "model": config_lib.to_dict(stage2_config(case))}
    model = stage2.from_config(contents, fused_attention=False)
    weights = {
        key: torch.from_numpy(value.copy())
        for key, value in case.weights.items()
        if not key.startswith("clip_teacher.")
    }
    model.load_state_dict(weights)
    return model


@pytest.mark.torch
def test_torch_visual(visual):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    model = _torch_model(torch, visual)
    inputs = {name: torch.from_numpy(value.copy()) for name, value in visual.inputs.items()}
    mask = inputs["attention_mask"]
    with torch.no_grad():
        text = model.encode_text(inputs["input_ids"], mask)
        for kind in ("video", "image"):
            out = model.encode_vision(inputs[kind].transpose(1, 2), inputs[f"{kind}_mask"])
            words = model.encode_text(inputs[f"{kind}_mlm_input_ids"], mask).tokens
            named = {
                "vision_embeds": out.tokens,
                "pooled": out.pooled,
                "vision_proj": out.joint,
                "text_proj": text.joint,
                "mlm_logits": model.word_logits(model.fuse(out.tokens, words, mask)),
            }
            _check(visual, named, f"{kind}/")
        match = model(inputs["video"].transpose(1, 2), inputs["input_ids"], mask).match_logits
    diagonal = np.diagonal(visual.outputs["eval/itm_match_logit"])
    goldens.assert_close(match[:, 1], diagonal, goldens.OUTPUT_LIMIT, "match")


@pytest.mark.torch
def test_torch_audiovisual(audiovisual):
    torch = pytest.importorskip("torch", reason="needs the torch extra")
    model = _torch_model(torch, audiovisual)
    inputs = {name: torch.from_numpy(value.copy()) for name, value in audiovisual.inputs.items()}
    mask, count = inputs["attention_mask"], len(inputs["idx"])
    with torch.no_grad():
        vision = model.encode_vision(inputs["video"].transpose(1, 2), inputs["video_mask"])
        audio = model.encode_audio(inputs["fbank"])
        text = model.encode_text(inputs["input_ids"], mask)
        both = torch.cat([audio.tokens, vision.tokens], dim=1)
        named = {
            "text_proj": text.joint,
            "vision_embeds_av": vision.tokens,
            "vision_proj": vision.joint,
            "audio_embeds_av": audio.tokens,
            "audio_proj": audio.joint,
        }
        if hasattr(model, "av_fusion"):
            joined = torch.cat([audio.joint, vision.joint], dim=-1)
            named["av_fusion"] = model.av_fusion(joined)
        _check(audiovisual, named)
        for name, head, media, tokens in (
            ("vtm", "itm_head", "video", vision.tokens),
            ("atm", "atm_head", "audio", audio.tokens),
            ("avtm", "avtm_head", "audiovisual", both),
        ):
            if not hasattr(model, head):
                continue
            logits = model.match_logits(model.fuse(tokens, text.tokens, mask), media)
            reference = audiovisual.outputs[f"{name}_logits"][:count]
            goldens.assert_close(logits, reference, goldens.OUTPUT_LIMIT, name)
