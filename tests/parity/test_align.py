"""Stage 2's step against the original: every term and its gradients, given the same draws."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.models.masking import mask_to_visible
from iv2_jax.models.stage2 import Stage2
from iv2_jax.models.teachers.base import TeacherOutput
from iv2_jax.objectives.matching import Negatives
from iv2_jax.train.align_config import AlignLossConfig, Towers, WordMask
from iv2_jax.train.align_terms import BatchTerms, Draws
from tests.parity import goldens
from tests.parity.stage2_goldens import channels_last, stage2_config, stage2_params
from tests.parity.test_stage2 import _check_gradients

EVAL = Towers(False, False, False, False)


class Given(Draws):
    """The original's draws out of a golden case, with a prefix for its batch."""

    def __init__(self, inputs, prefix=""):
        self.inputs, self.prefix = inputs, prefix

    def hidden_words(self, term, ids):
        names = (f"{self.prefix}{term}_input_ids", f"{self.prefix}{term}_labels")
        return tuple(jnp.asarray(self.inputs[name]) for name in names)

    def negatives(self, term, side, *args):
        # Cases of one matching term call its media "vision", others name the term.
        names = (f"{self.prefix}vision_neg_idx", f"{term}_media_neg_idx")
        if side == "text":
            names = (f"{self.prefix}text_neg_idx", f"{term}_text_neg_idx")
        index = next(self.inputs[name] for name in names if name in self.inputs)
        return Negatives(jnp.asarray(index), jnp.ones(len(index), bool))


def _terms(model, case, loss, names, prefix="", video="video", teacher=None):
    """The terms of one of the case's batches."""
    inputs = case.inputs
    encoder = model.config.vision.encoder
    # Its pixels are normalised already; ours are bytes' values.
    mean, std = (np.asarray(x, np.float32) for x in (encoder.pixel_mean, encoder.pixel_std))
    batch = {
        "video": jnp.asarray((channels_last(inputs[video]) * std + mean) * 255),
        "text_caption": jnp.where(inputs["attention_mask"] > 0, inputs["input_ids"], 0),
        "match_id": jnp.asarray(inputs["idx"]),
    }
    if "fbank" in inputs:
        batch["fbank"] = jnp.asarray(inputs["fbank"])
    visible = jnp.asarray(mask_to_visible(inputs[f"{video}_mask"]))
    if teacher is not None:
        teacher = TeacherOutput(_all_tokens(teacher[0], visible, model), jnp.asarray(teacher[1]))
    draws = Given(inputs, prefix)
    towers = {"visible": visible, "teacher": teacher, "train": EVAL}
    return BatchTerms(model, loss, batch, names, draws, **towers).compute()


def _all_tokens(tokens, visible, model):
    """The teacher's visible tokens, where they lie among all."""
    number = 1 + int(np.prod(model.config.vision.encoder.grid))
    whole = jnp.zeros((*tokens.shape[:2], number, tokens.shape[-1]))
    return whole.at[:, jnp.arange(len(visible))[:, None], visible].set(tokens)


def _loss_config(case, **fields):
    weights = {name: float(weight) for name, weight in case.meta["loss_weight"].items() if weight}
    words = WordMask(logits_share=1.0)
    fields["teacher_ratios"] = tuple(case.meta.get("clip_loss_ratio", (1.0, 1.0)))
    return AlignLossConfig(weights=weights, default_caption="caption", words=words, **fields)


def test_video_and_image_batches(golden):
    case = golden("s2_visual_all_losses")
    config, loss = stage2_config(case), _loss_config(case)
    names = loss.terms("video")
    assert set(names) >= {"vtc", "vtm", "mlm"}

    def run(model):
        found = {}
        for kind in ("video", "image"):
            teacher = None
            if "uta" in names:
                outputs = case.outputs
                middle = outputs[f"{kind}/teacher_middle_visible"]
                teacher = middle, outputs[f"{kind}/teacher_final"]
            found[kind] = _terms(model, case, loss, names, f"{kind}_", kind, teacher)
        weighted = {
            f"{kind}/loss_{name}": loss.weights[name] * value
            for kind, terms in found.items()
            for name, value in terms.items()
        }
        return sum(weighted.values()), weighted

    def loss_fn(params):
        return Stage2(config).apply({"params": params}, method=run)

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (total, weighted), grads = step(stage2_params(case, config))
    for name, value in weighted.items():
        assert abs(value - case.outputs[name]) < goldens.LOSS_LIMIT, name
    assert abs(total - case.loss) < goldens.LOSS_LIMIT
    _check_gradients(case, config, grads)


def test_ten_terms_of_videos_with_sound(golden):
    case = golden("s2_audiovisual_all_losses")
    config, loss = stage2_config(case), _loss_config(case)
    names = loss.terms("audio_video")
    assert set(names) == set(loss.weights)

    def loss_fn(params):
        terms = Stage2(config).apply({"params": params}, case, loss, names, method=_terms)
        weighted = {name: loss.weights[name] * value for name, value in terms.items()}
        return sum(weighted.values()), weighted

    step = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (total, weighted), grads = step(stage2_params(case, config))
    for name, value in weighted.items():
        assert abs(value - case.outputs[f"loss_{name}"]) < goldens.LOSS_LIMIT, name
    assert abs(total - case.loss) < goldens.LOSS_LIMIT
    _check_gradients(case, config, grads)
