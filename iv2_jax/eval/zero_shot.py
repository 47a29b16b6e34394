"""Zero-shot recognition by class names, and multiple choice (spec stage2 9.2)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jax.sharding import Mesh

from iv2_jax.data import captions
from iv2_jax.data.modalities import TextConfig
from iv2_jax.data.pipeline import DataConfig
from iv2_jax.data.records import Clip
from iv2_jax.data.row_texts import load_tokenizer
from iv2_jax.errors import ConfigError, DataError, nearest
from iv2_jax.eval import retrieval, retrieval_texts
from iv2_jax.eval.retrieval_task import RetrievalOptions, open_loader
from iv2_jax.eval.retrieval_towers import ModelConfig, Towers, check_media

logger = logging.getLogger(__name__)

TOP = (1, 5)


@dataclass
class ZeroShotResult:
    """Scores of classes.

    Attributes:
      metrics: `top1`, `top5` (percent), their mean `avg` and the mean accuracy over classes
        `class_mean`; the same under `dsl/` with the dual softmax over the whole set; `chance/`;
        `clips`, `classes`, `left_out`.
      scores: (V, C) mean cosines over the templates.
      clips: The V clips.
      classes: Sorted names.
      labels: int (V,) right classes.
    """

    metrics: dict[str, float]
    scores: np.ndarray
    clips: list[Clip]
    classes: tuple[str, ...]
    labels: np.ndarray


def evaluate_zero_shot(
    params: Any,
    config: ModelConfig,
    data: DataConfig,
    label: str,
    *,
    classes: Sequence[str] = (),
    templates: Sequence[str] = (),
    batch_size: int = 16,
    mesh: Mesh | None = None,
    seed: int = 0,
    options: RetrievalOptions | None = None,
) -> ZeroShotResult:
    """Recognises classes by their names, without training on them.

    Args:
      params: Of the model.
      config: A stage-2 or CLIP model.
      data: The clips; `data.text` says how texts become ids.
      label: Name of the label set whose values are class names.
      classes: All class names; empty takes those that the clips have. They are sorted, so that
        every process has one order (spec stage2 11.19).
      templates: Texts with `{}` for the name; empty takes the original's for actions.
      batch_size: Clips a forward pass over all devices.
      mesh: Device mesh; None takes the one `params` lie on.
      seed: Of the loader.
      options: Batch size of texts and segments.

    Raises:
      ConfigError: The model cannot do what is asked, or a template has no `{}`.
      DataError: No clip has the label, or one has a class that is not among `classes`.
    """
    options = options or RetrievalOptions()
    if data.text is None:
        raise ConfigError("zero-shot recognition needs data.text: the tokenizer")
    check_media(config, data.media, rerank=False)
    towers = Towers(params, config, mesh)
    with open_loader(data, towers.round_up(batch_size), seed) as loader:
        clips = loader.source.clips
        names = class_names(clips, label, classes)
        media = towers.encode_media(loader, data.media, segments=options.segments)
    place = {name: i for i, name in enumerate(names)}
    keep = np.array([label in clips[i].labels for i in media.index], bool)
    left_out = len(clips) - int(keep.sum())
    if left_out:
        logger.warning(
            "zero-shot leaves out %d clips that do not decode or have no %r", left_out, label
        )
    if not keep.any():
        raise DataError(f"no clip that decodes has a label {label!r}")
    index = media.index[keep]
    texts = encode_prompts(towers, names, templates, data.text, options.text_batch_size)
    scores = class_scores(media.joint[keep], texts)
    labels = np.array([place[str(clips[i].labels[label])] for i in index])
    metrics = accuracy(scores, labels)
    # The original's other figure: it looks at all clips of the set at once.
    dsl = accuracy(retrieval.dual_softmax(scores), labels)
    metrics |= {f"dsl/{name}": value for name, value in dsl.items()}
    metrics |= {f"chance/top{k}": 100.0 * min(k, len(names)) / len(names) for k in TOP}
    metrics |= {
        "clips": float(len(index)),
        "classes": float(len(names)),
        "left_out": float(left_out),
    }
    return ZeroShotResult(metrics, scores, [clips[i] for i in index], names, labels)


def class_names(clips: Sequence[Clip], label: str, classes: Sequence[str] = ()) -> tuple[str, ...]:
    """All class names, sorted.

    Raises:
      DataError: No clip has the label, or one has a class that is not among `classes`.
    """
    found = {str(clip.labels[label]) for clip in clips if label in clip.labels}
    if not found:
        known = {name for clip in clips for name in clip.labels}
        raise DataError(f"no clip has a label {label!r}{nearest(label, known)}")
    unknown = found - set(classes)
    if classes and unknown:
        name = min(unknown)
        raise DataError(f"class {name!r} of label {label!r} is not listed{nearest(name, classes)}")
    return tuple(sorted(set(classes) or found))


def encode_prompts(
    towers: Towers,
    names: Sequence[str],
    templates: Sequence[str],
    text: TextConfig,
    batch_size: int,
) -> np.ndarray:
    """Joint vectors (C, P, D) of every class name in every template.

    Raises:
      ConfigError: A template has no `{}`.
    """
    templates = tuple(templates) or captions.ACTION_TEMPLATES
    for template in templates:
        if template.count("{}") != 1:
            raise ConfigError(f"template {template!r} must have one {{}} where the class name goes")
    prompts = [
        retrieval_texts.clean(captions.format_prompt(template, name), text)
        for name in names
        for template in templates
    ]
    ids, mask = load_tokenizer(text).encode_batch(prompts)
    joint = towers.encode_texts(ids, mask, batch_size=batch_size).joint
    return joint.reshape(len(names), len(templates), -1)


def class_scores(media: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """Mean cosine of clips with a class's prompts, each prompt at unit length.

    Args:
      media: (V, D).
      texts: (C, P, D).

    Returns:
      (V, C) float32. The prompts are not averaged first: that would weigh them by how much they
      agree.
    """
    classes, prompts, width = texts.shape
    scores = retrieval.cosine_scores(media, texts.reshape(-1, width))
    return scores.reshape(len(media), classes, prompts).mean(axis=2)


def accuracy(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Top-1, top-5, their mean, and the mean over classes of top-1, in percent.

    Args:
      scores: (V, C).
      labels: int (V,). A class that ties with the right one counts as before it.
    """
    rank = retrieval.ranks(scores, np.arange(scores.shape[1]) == labels[:, None])
    metrics = {f"top{k}": 100.0 * float((rank < k).mean()) for k in TOP}
    metrics["avg"] = (metrics["top1"] + metrics["top5"]) / 2
    by_class = [(rank[labels == c] < 1).mean() for c in np.unique(labels)]
    return metrics | {"class_mean": 100.0 * float(np.mean(by_class))}


def choice_accuracy(probabilities: np.ndarray, answers: np.ndarray) -> float:
    """Percent of clips whose most probable option is the answer (SSv2-MC).

    Args:
      probabilities: (N, K), of `retrieval.choice_probabilities`.
      answers: int (N,).
    """
    return 100.0 * float((probabilities.argmax(axis=1) == answers).mean())


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the average precision, in percent (Charades).

    For each class the clips are sorted by score; the precision at the place of every right clip
    is averaged. A class without a right clip counts as 0, as in the original's meter.

    Args:
      scores: (N, C).
      labels: (N, C), 1 where the class is right.
    """
    if scores.shape != labels.shape:
        raise DataError(f"scores {scores.shape} and labels {labels.shape} differ in shape")
    order = np.argsort(-scores, axis=0, kind="stable")
    right = np.take_along_axis(np.asarray(labels, bool), order, axis=0)
    places = np.arange(1, len(scores) + 1)[:, None]
    precision = np.cumsum(right, axis=0) / places
    each = (precision * right).sum(axis=0) / np.maximum(right.sum(axis=0), 1)
    return 100.0 * float(each.mean())


def evaluate_choices(
    params: Any,
    config: ModelConfig,
    data: DataConfig,
    options_of: Sequence[Sequence[str]],
    *,
    batch_size: int = 16,
    mesh: Mesh | None = None,
    options: RetrievalOptions | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of each clip's own options: softmax of cosine / temperature.

    Args:
      params: Of the model.
      config: A stage-2 or CLIP model.
      data: The clips; `data.text` says how texts become ids.
      options_of: For every clip of the split, in its order, K texts; the same K for all.
      batch_size: Clips a forward pass over all devices.
      mesh: Device mesh; None takes the one `params` lie on.
      options: Batch size of texts and segments.

    Returns:
      Positions (V,) of the clips that decode, and (V, K) probabilities, for `choice_accuracy` or
      `mean_average_precision`.

    Raises:
      DataError: Clips and options do not fit.
    """
    options = options or RetrievalOptions()
    if data.text is None:
        raise ConfigError("multiple choice needs data.text: the tokenizer")
    widths = {len(texts) for texts in options_of}
    if len(widths) != 1:
        raise DataError(f"every clip needs the same number of options; there are {sorted(widths)}")
    towers = Towers(params, config, mesh)
    with open_loader(data, towers.round_up(batch_size), 0) as loader:
        if len(loader.source.clips) != len(options_of):
            raise DataError(
                f"{len(options_of)} lists of options do not fit {len(loader.source.clips)} clips"
            )
        media = towers.encode_media(loader, data.media, segments=options.segments)
    cleaned = [
        [retrieval_texts.clean(text, data.text) for text in options_of[i]] for i in media.index
    ]
    unique = list(dict.fromkeys(text for texts in cleaned for text in texts))
    place = {text: i for i, text in enumerate(unique)}
    ids, mask = load_tokenizer(data.text).encode_batch(unique)
    joint = towers.encode_texts(ids, mask, batch_size=options.text_batch_size).joint
    chosen = np.array([[place[text] for text in texts] for texts in cleaned])
    scores = retrieval.cosine_scores(media.joint, joint)
    each = np.take_along_axis(scores, chosen, axis=1)
    return media.index, retrieval.softmax(each / towers.temperature())


def zero_shot_json(result: ZeroShotResult) -> dict[str, Any]:
    """The result as plain values, with every clip's best class."""
    best = result.scores.argmax(axis=1)
    return {
        "metrics": result.metrics,
        "classes": list(result.classes),
        "predictions": {
            clip.id: {"right": result.classes[int(right)], "found": result.classes[int(found)]}
            for clip, right, found in zip(result.clips, result.labels, best, strict=True)
        },
    }
