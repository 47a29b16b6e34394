"""What stage 2 computes of one batch: features, matching and words, and from them every loss term.

Rows stay where they are: versions of a row (a caption and its corrupted copies, a true pair and its
wrong ones) lie beside each other on a second axis, never behind the batch, so that a batch split
over devices needs no exchange for them.
"""

from __future__ import annotations

import functools
import zlib
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from iv2_jax.models.stage2 import MediaFeatures, Stage2, TextFeatures, join_tokens
from iv2_jax.models.teachers.base import TeacherOutput
from iv2_jax.models.text.bert_layers import Versions
from iv2_jax.objectives import contrastive, distillation, masked_lm, matching
from iv2_jax.objectives.alignment_terms import TERMS
from iv2_jax.train import kept_texts
from iv2_jax.train.align_config import AlignLossConfig, Towers
from iv2_jax.train.stage import Batch

Terms = dict[str, jax.Array]


def named_rng(rng: jax.Array, name: str) -> jax.Array:
    """A key by name, so that one draw more or less changes no other."""
    return jax.random.fold_in(rng, zlib.crc32(name.encode()))


class Draws:
    """The random choices of a step; parity tests give the original's instead."""

    def __init__(self, rng: jax.Array, loss: AlignLossConfig, vocab_size: int) -> None:
        self._rng, self._loss, self._vocab_size = rng, loss, vocab_size

    def hidden_words(self, term: str, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Corrupted ids and labels (B, L) of a term on words."""
        return masked_lm.corrupt(
            named_rng(self._rng, f"words of {term}"),
            ids,
            vocab_size=self._vocab_size,
            mask_id=self._loss.words.mask_id,
            special_ids=self._loss.words.special_ids,
            probability=self._loss.words.probability,
        )

    def negatives(
        self,
        term: str,
        side: str,
        rows: jax.Array,
        columns: jax.Array,
        temperature: jax.Array,
        ids: jax.Array,
        valid: jax.Array,
    ) -> matching.Negatives:
        """For each row of a matching term, a column of another id: wrong `side`, media or text."""
        return matching.mine_negatives(
            named_rng(self._rng, f"{side} of {term}"),
            rows,
            columns,
            temperature,
            ids,
            valid=valid,
            group_size=self._loss.group(len(ids)),
            hard=self._loss.hard_negatives,
        )


@dataclass(frozen=True)
class Media:
    """One side of a batch: pictures, sound, or both joined.

    Attributes:
        tokens: (B, N, C) what captions read; None for text alone.
        joint: (B, J) in the joint space; None where sound and picture are not joined in one.
        valid: (B,) bool, rows that have it.
    """

    tokens: jax.Array | None
    joint: jax.Array | None
    valid: jax.Array


class BatchTerms:
    """The terms of one batch."""

    def __init__(
        self,
        model: Stage2,
        loss: AlignLossConfig,
        batch: Batch,
        names: tuple[str, ...],
        draws: Draws,
        *,
        visible: jax.Array | None,
        teacher: TeacherOutput | None,
        train: Towers,
    ) -> None:
        """Encodes what the terms need.

        Args:
            model: the bound model.
            loss: what is computed how.
            batch: see `train.align`.
            names: terms to compute.
            draws: negatives and hidden words; the towers' own draws have their rng streams.
            visible: (B, N) video tokens that are seen; None for all.
            teacher: what the teacher gives of the batch's pictures, for `uta`.
            train: which towers drop paths and values.
        """
        self.model, self.loss, self.batch, self.names = model, loss, batch, names
        self.draws, self.visible, self.teacher, self.train = draws, visible, teacher, train
        self.ids = batch["match_id"]
        self.rows = len(self.ids)
        self.temperature = contrastive.clamp_temperature(model.temp)
        self.vision: MediaFeatures | None = None
        self.media = self._encode_media()
        self.labels: dict[str, jax.Array] = {}
        self.texts = self._encode_texts()

    def compute(self) -> Terms:
        """Term -> float32 scalar, unweighted, in the order of `names`."""
        terms: Terms = {}
        for name in self.names:
            if TERMS[name].kind == "contrast":
                terms[name] = self._contrast(name)
            elif TERMS[name].kind == "teacher":
                terms[name] = self._align_with_teacher()
        for media in ("video", "audio", "audiovisual"):
            match, words = (self._term("match", media), self._term("words", media))
            if match or words:
                terms |= self._read(media, match, words)
        return {name: terms[name] for name in self.names}

    def _term(self, kind: str, media: str) -> str:
        """The term of a kind that reads these media, or nothing."""
        terms = (n for n in self.names if (TERMS[n].kind, TERMS[n].media) == (kind, media))
        return next(terms, "")

    def _encode_media(self) -> dict[str, Media]:
        """What the batch has: `video`, `audio` and, with both, `audiovisual`."""
        model, batch, media = self.model, self.batch, {}
        valid = batch.get("valid", jnp.ones(self.rows, bool))
        if "video" in batch:
            pixels = model.config.vision.encoder.normalize(batch["video"])
            self.vision = model.encode_vision(pixels, self.visible, train=self.train.vision)
            has = valid & batch.get("has_video", True)
            media["video"] = Media(self.vision.tokens, self.vision.joint, has)
        if "fbank" in batch:
            audio = model.encode_audio(batch["fbank"], train=self.train.audio)
            media["audio"] = Media(audio.tokens, audio.joint, valid & batch.get("has_audio", True))
        if len(media) == 2:
            sound, picture = media["audio"], media["video"]
            fused = model.config.av_fusion
            media["audiovisual"] = Media(
                join_tokens(sound.tokens, picture.tokens),
                model.fuse_joint(sound.joint, picture.joint) if fused else None,
                sound.valid & picture.valid,
            )
        if not media:
            media["video"] = Media(None, None, valid)  # text alone reads nothing
        return media

    def _caption(self, name: str) -> jax.Array:
        """(B, L) ids of the caption that a term uses."""
        return self.batch[f"text_{self.loss.caption(name)}"]

    def _encode_texts(self) -> dict[str, TextFeatures]:
        """Each caption that a term uses, and each corrupted copy, in one pass: by term."""
        whole = [n for n in self.names if TERMS[n].kind == "match" or _contrasts_text(n)]
        versions: dict[str, jax.Array] = {}
        masks: list[jax.Array] = []
        for name in [*whole, *(n for n in self.names if TERMS[n].kind == "words")]:
            key = self._version(name)
            if key in versions:
                continue
            ids = self._caption(name)
            masks.append((ids != self.loss.words.pad_id).astype(jnp.int32))
            if TERMS[name].kind == "words":
                ids, self.labels[name] = self.draws.hidden_words(name, ids)
            versions[key] = ids
        if not versions:  # sound against picture alone
            return {}
        if any(name.startswith(kept_texts.PREFIX) for name in self.batch):
            return self._kept_texts(whole, masks)
        ids, mask = jnp.stack(list(versions.values()), axis=1), jnp.stack(masks, axis=1)
        flat = (-1, ids.shape[-1])
        text = self.model.encode_text(ids.reshape(flat), mask.reshape(flat), train=self.train.text)
        return {
            key: TextFeatures(
                text.hidden.reshape(*ids.shape, -1)[:, i],
                mask[:, i],
                text.joint.reshape(*ids.shape[:2], -1)[:, i],
            )
            for i, key in enumerate(versions)
        }

    def _kept_texts(self, names: list[str], masks: list[jax.Array]) -> dict[str, TextFeatures]:
        """Captions whose features the batch has already; contrasts alone are computed of them."""
        captions = dict.fromkeys(self.loss.caption(name) for name in names)
        first = {name: self.batch[kept_texts.PREFIX + name] for name in captions}
        return {
            f"caption {name}": TextFeatures(x[:, None], mask, self.model.project_text(x))
            for (name, x), mask in zip(first.items(), masks, strict=True)
        }

    def _version(self, name: str) -> str:
        """Key of the text that a term reads: a caption, or its own corrupted copy of one."""
        if TERMS[name].kind == "words":
            return f"words of {name}"
        return f"caption {self.loss.caption(name)}"

    def _valid(self, name: str, media: str) -> jax.Array:
        """(B,) bool: rows with these media whose caption has words beside the special tokens."""
        ids = self._caption(name)
        words = jnp.ones(ids.shape, bool)
        for special in self.loss.words.special_ids:
            words &= ids != special
        return self.media[media].valid & jnp.any(words, axis=1)

    def _contrast(self, name: str) -> jax.Array:
        """A contrastive term over the global batch."""
        term, loss = TERMS[name], self.loss
        side = self.media[term.media]
        if term.other == "text":
            other, valid = self.texts[self._version(name)].joint, self._valid(name, term.media)
        else:
            other = self.media[term.other].joint
            valid = side.valid & self.media[term.other].valid
        a, b = (contrastive.scale_gradient(x, loss.feature_gradient) for x in (side.joint, other))
        return contrastive.contrastive_loss(
            a,
            b,
            self.temperature,
            self.ids,
            valid=valid,
            form=loss.form,
            kind=loss.contrastive,
            bias=self.model.contrast_bias if loss.contrastive == "sigmoid" else None,
        )

    def _align_with_teacher(self) -> jax.Array:
        """Tokens and final feature of the vision tower against the teacher's (spec 6.4)."""
        target = self.teacher.tokens
        if self.visible is not None:
            target = distillation.gather_targets(target, self.visible, has_cls=True)
        tokens = distillation.alignment_loss(self.vision.aligned, target)
        final = distillation.final_loss(self.vision.aligned_final, self.teacher.pooled)
        return self.loss.teacher_ratios[0] * tokens + self.loss.teacher_ratios[1] * final

    def _read(self, media: str, match: str, words: str) -> Terms:
        """The terms whose captions read these media, in one pass through the fusion layers."""
        side, group = self.media[media], self.loss.group(self.rows)
        texts: list[TextFeatures] = []
        swap = None
        if words:
            texts.append(self.texts[self._version(words)])
        if match:
            wrong_media, wrong_text, valid = self._negatives(match, media)
            text = self.texts[self._version(match)]
            texts += [
                text,
                jax.tree.map(lambda x: matching.take_in_groups(x, wrong_text.index, group), text),
                text,  # reads wrong media
            ]
            swap = functools.partial(
                matching.take_in_groups, index=wrong_media.index, group_size=group
            )
        fused = self.model.fuse(
            side.tokens,
            _beside([text.hidden for text in texts]),
            _beside([text.mask for text in texts]),
            versions=Versions(len(texts), swap),
            train=self.train.fusion,
        )
        fused = fused.reshape(self.rows, len(texts), *fused.shape[1:])
        terms: Terms = {}
        if match:
            first = fused[:, -3:, 0].reshape(3 * self.rows, 1, -1)
            logits = self.model.match_logits(first, media).reshape(self.rows, 3, 2)
            logits = logits[:, jnp.array([0, 2, 1])].swapaxes(0, 1).reshape(-1, 2)
            terms[match] = matching.matching_loss(
                logits, wrong_media.found, wrong_text.found, valid=valid
            )
        if words:
            has = self._valid(words, media)[:, None]
            labels = jnp.where(has, self.labels[words], masked_lm.IGNORED)
            terms[words] = masked_lm.masked_lm_loss_of(
                fused[:, 0], labels, self.model.word_logits, self.loss.words.capacity(labels.size)
            )
        return terms

    def _negatives(
        self, match: str, media: str
    ) -> tuple[matching.Negatives, matching.Negatives, jax.Array]:
        """Wrong media for each text, a wrong text for each of the media, and the valid rows."""
        valid = self._valid(match, media)
        a, b = self.media[media].joint, self.texts[self._version(match)].joint
        rest = (self.temperature, self.ids, valid)
        return (
            self.draws.negatives(match, "media", b, a, *rest),
            self.draws.negatives(match, "text", a, b, *rest),
            valid,
        )


def _contrasts_text(name: str) -> bool:
    return TERMS[name].kind == "contrast" and TERMS[name].other == "text"


def _beside(versions: list[jax.Array]) -> jax.Array:
    """(B, ...) versions of each row, as (B * V, ...) with a row's versions beside each other."""
    stacked = jnp.stack(versions, axis=1)
    return stacked.reshape(-1, *stacked.shape[2:])
