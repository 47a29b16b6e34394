"""Text-to-media and media-to-text retrieval of a stage-2 or CLIP model over held-out clips."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import jax
import numpy as np
from jax.sharding import Mesh

from iv2_jax.data.pipeline import DataConfig, Loader, make_loader
from iv2_jax.data.records import Clip
from iv2_jax.data.row_texts import load_tokenizer
from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval import retrieval, retrieval_rerank, retrieval_texts
from iv2_jax.eval.retrieval_towers import EncodedMedia, ModelConfig, Towers, check_media

logger = logging.getLogger(__name__)

EVAL_AUGMENTS = ("center", "stretch")


@dataclass(frozen=True)
class RetrievalOptions:
    """How retrieval is evaluated, beyond what the data config says.

    Attributes:
      caption: Which caption asks; empty = the first of `data.text.captions`.
      text_batch_size: Texts a forward pass.
      pairs_per_batch: Pairs a batch of the second pass.
      segments: A stage-2 model averages over so many interleaved sub-clips of
        `segments * num_frames` frames.
      same_text_relevant: Equal texts of several clips are one text, right for all of them. False
        is the original: each caption is right for its own clip alone.
      rerank_by: Scores that choose the candidates of the second pass.
      mix: Weight of the first pass's cosine / temperature beside the matching logit; the
        original ranks by the logit alone, 0.
      released_fill: See `retrieval_rerank.match_scores`.
    """

    caption: str = ""
    text_batch_size: int = 256
    pairs_per_batch: int = 256
    segments: int = 1
    same_text_relevant: bool = True
    rerank_by: Literal["sim", "dsl"] = "sim"
    mix: float = 0.0
    released_fill: bool = False

    def __post_init__(self) -> None:
        for name in ("text_batch_size", "pairs_per_batch", "segments"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.rerank_by not in ("sim", "dsl"):
            raise ConfigError(f"rerank_by {self.rerank_by!r}: choose 'sim' or 'dsl'")


@dataclass
class RetrievalResult:
    """What was found and what it is worth.

    Attributes:
      metrics: `{sim,dsl,match,chance}/...` as `retrieval.ranking_metrics` names them (percent),
        and the numbers `clips`, `texts`, `captions`, `left_out`.
      scores: (V, T) float32 cosines.
      clips: The V clips that took part.
      index: (V,) their positions in the split's list.
      texts: The T texts.
      relevant: bool (V, T), which text is right for which clip.
      counts: int (T,), how often each text counts as a query.
      match: After a second pass its scores, `v2t` (V, T) and `t2v` (T, V); else None.
      left_out: Reason -> ids of clips that took no part.
    """

    metrics: dict[str, float]
    scores: np.ndarray
    clips: list[Clip]
    index: np.ndarray
    texts: tuple[str, ...]
    relevant: np.ndarray
    counts: np.ndarray
    match: dict[str, np.ndarray] | None = None
    left_out: dict[str, list[str]] = field(default_factory=dict)

    @property
    def t2v(self) -> np.ndarray:
        """(T, V) the best scores there are of text to media: of the second pass, else cosines."""
        return self.scores.T if self.match is None else self.match["t2v"]


def evaluation_data(data: DataConfig) -> DataConfig:
    """A data config that reads every clip once, in order, in one deterministic view.

    Raises:
      ConfigError: It has several views or crops (spec stage2 11.26).
    """
    if data.num_views > 1:
        raise ConfigError(
            f"data.views={data.views}, data.crops={data.crops}: retrieval takes one view of a clip "
            "(a stage-2 model can average over sub-clips: segments)"
        )
    if data.eval:
        return data
    augment = data.augment
    if augment not in EVAL_AUGMENTS:
        augment = "stretch" if augment == "random_resized_crop" else "center"
    one_pass = {"eval": True, "fixed_view": False, "keep_views": 0, "keep_gb": 0.0}
    return dataclasses.replace(data, **one_pass, augment=augment, mask="none", targets="")


def open_loader(data: DataConfig, batch_size: int, seed: int) -> Loader:
    """This process's rows of one pass over the clips."""
    return make_loader(
        evaluation_data(data),
        seed=seed,
        global_batch=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def evaluate_retrieval(
    params: Any,
    config: ModelConfig,
    data: DataConfig,
    *,
    rerank_top: int = 0,
    batch_size: int = 16,
    mesh: Mesh | None = None,
    seed: int = 0,
    options: RetrievalOptions | None = None,
) -> RetrievalResult:
    """Evaluates retrieval in both directions (spec stage2 9.1 and 9.2).

    Args:
      params: Of the model, on the host or on the devices of `mesh`.
      config: A stage-2 or CLIP model.
      data: The held-out clips; `data.text` says how captions become ids, `data.media` what is
        looked for: video, image, audio, or audio_video by the fused vector.
      rerank_top: Candidates of each query that a second pass with the fusion layers and the
        matching head judges; 0 = no second pass.
      batch_size: Clips a forward pass over all devices; rounded up to what the mesh splits.
      mesh: Device mesh; None takes the one `params` lie on.
      seed: Of the loader.
      options: The rest.

    Raises:
      ConfigError: The model cannot do what is asked, or `data.text` is missing.
      DataError: No clip is left, or features are not finite.
    """
    options = options or RetrievalOptions()
    if data.text is None:
        raise ConfigError("retrieval needs data.text: the tokenizer and which caption asks")
    check_media(config, data.media, rerank=rerank_top > 0)
    towers = Towers(params, config, mesh)
    caption = retrieval_texts.choose_caption(data.text, options.caption)
    with open_loader(data, towers.round_up(batch_size), seed) as loader:
        clips = loader.source.clips
        own = retrieval_texts.clip_texts(loader.source, caption, data.text)
        media = towers.encode_media(
            loader, data.media, segments=options.segments, keep_tokens=rerank_top > 0
        )
    media, left_out = _usable(media, own, clips, data.media)
    texts = retrieval_texts.text_set(
        [own[i] for i in media.index], same_text_relevant=options.same_text_relevant
    )
    ids, mask = load_tokenizer(data.text).encode_batch(texts.texts)
    encoded = towers.encode_texts(
        ids, mask, batch_size=options.text_batch_size, keep_hidden=rerank_top > 0
    )
    scores = retrieval.cosine_scores(media.joint, encoded.joint)
    directions = {"sim": (scores, scores.T)}
    directions["dsl"] = (retrieval.dual_softmax(scores), retrieval.dual_softmax(scores.T))
    if rerank_top:
        judged = retrieval_rerank.judge(
            towers,
            media,
            encoded,
            data.media,
            *directions[options.rerank_by],
            top=rerank_top,
            pairs_per_batch=options.pairs_per_batch,
        )
        directions["match"] = _match(judged, scores, towers, options)
    metrics = _metrics(directions, texts)
    metrics |= {
        "clips": float(len(media.index)),
        "texts": float(len(texts.texts)),
        "captions": float(texts.counts.sum()),
        "left_out": float(sum(map(len, left_out.values()))),
    }
    return RetrievalResult(
        metrics,
        scores,
        [clips[i] for i in media.index],
        media.index,
        texts.texts,
        texts.relevant,
        texts.counts,
        dict(zip(("v2t", "t2v"), directions["match"], strict=True)) if rerank_top else None,
        left_out,
    )


def _usable(
    media: EncodedMedia, own: Sequence[Sequence[str]], clips: Sequence[Clip], kind: str
) -> tuple[EncodedMedia, dict[str, list[str]]]:
    """The clips that were encoded and have a text; and the others by reason."""
    keep = np.array([bool(own[i]) for i in media.index], bool)
    reasons = {
        "no sound that decodes" if kind == "audio" else "does not decode": media.undecodable,
        "no usable sound": media.silent,
        "no caption": media.index[~keep].tolist(),
    }
    left_out = {why: [clips[i].id for i in at] for why, at in reasons.items() if at}
    for why, ids in left_out.items():
        shown = ", ".join(ids[:3]) + (" ..." if len(ids) > 3 else "")
        logger.warning(
            "retrieval leaves out %d of %d clips: %s (%s)", len(ids), len(clips), why, shown
        )
    if not keep.any():
        raise DataError(
            "retrieval has no clip left: "
            + ", ".join(f"{len(ids)} {why}" for why, ids in left_out.items())
        )
    media = dataclasses.replace(
        media, index=media.index[keep], joint=media.joint[keep], owner=media.owner[keep]
    )
    return media, left_out


def _match(
    judged: retrieval_rerank.Judged, scores: np.ndarray, towers: Towers, options: RetrievalOptions
) -> tuple[np.ndarray, np.ndarray]:
    """Scores of both directions after the second pass."""
    settings = {
        "mix": options.mix,
        "temperature": towers.temperature() if options.mix else 1.0,
        "released_fill": options.released_fill,
    }
    return (
        retrieval_rerank.match_scores(judged.logits, judged.v2t, scores, **settings),
        retrieval_rerank.match_scores(judged.logits.T, judged.t2v, scores.T, **settings),
    )


def _metrics(
    directions: dict[str, tuple[np.ndarray, np.ndarray]], texts: retrieval_texts.TextSet
) -> dict[str, float]:
    """Metrics of every kind of score, and of chance, under one flat dict."""
    found = {
        kind: retrieval.ranking_metrics(v2t, t2v, texts.relevant, texts.counts)
        for kind, (v2t, t2v) in directions.items()
    }
    found["chance"] = retrieval.chance_metrics(texts.relevant, texts.counts)
    return {
        f"{kind}/{name}": value for kind, values in found.items() for name, value in values.items()
    }
