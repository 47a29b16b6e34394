"""What retrieval a linear map reaches from frozen video features to MiniLM's sentence features.

The yardstick of stage 2: the same for the student of stage 1 and for random weights. A map is
fitted by ridge regression on the training clips, every caption a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from iv2_jax.eval import retrieval

RIDGE = 10.0  # with features of unit variance
FEATURE = "frames"  # tokens averaged over space, frames apart, as the linear probe reads


def frozen_retrieval(
    model: Any, data: Mapping[str, Any], features: Mapping[str, np.ndarray], names: Sequence[str]
) -> list[dict[str, float]]:
    """Retrieval over the held-out clips from frozen features.

    Args:
      model: A stage-2 model with the pretrained text tower, of `eval.model_runs`.
      data: `DataConfig` of the splits `train` and `test`.
      features: What `iv2 eval --features` wrote.
      names: Prefixes of the features' names: runs, or `random weights, seed N`.

    Returns:
      For each name the metrics of `eval.retrieval.ranking_metrics`.
    """
    from iv2_jax.data.corpora import open_data
    from iv2_jax.eval import retrieval_texts

    sets = {}
    for split, config in data.items():
        caption = config.text.captions[0]
        own = retrieval_texts.clip_texts(open_data(config), caption, config.text)
        if split == "test" and not all(own):
            own = [texts or ("",) for texts in own]
        sets[split] = own
    texts = retrieval_texts.text_set(sets["test"])
    train_texts = sorted({text for own in sets["train"] for text in own})
    sentences = sentence_features(model, data["test"].text, [*train_texts, *texts.texts])
    known = dict(zip(train_texts, sentences, strict=False))
    asked = sentences[len(train_texts) :]
    pairs = [(clip, text) for clip, own in enumerate(sets["train"]) for text in own]
    rows = np.array([clip for clip, _ in pairs])
    targets = np.stack([known[text] for _, text in pairs])
    results = []
    for name in names:
        train, test = (features[f"{name}/{split}/{FEATURE}"] for split in ("train", "test"))
        at_train, at_test = (features[f"{name}/{split}/index"] for split in ("train", "test"))
        x = np.zeros((len(sets["train"]), train.shape[1]), np.float32)
        x[at_train] = train
        y = np.zeros((len(sets["test"]), test.shape[1]), np.float32)
        y[at_test] = test
        scores = ridge_scores(x[rows], targets, y, asked)
        results.append(retrieval.ranking_metrics(scores, scores.T, texts.relevant, texts.counts))
    return results


def ridge_scores(
    train: np.ndarray,
    targets: np.ndarray,
    test: np.ndarray,
    asked: np.ndarray,
    ridge: float = RIDGE,
) -> np.ndarray:
    """Cosines (V, T) of mapped clips with texts, both without the mean of the training texts.

    Args:
      train: (n, D) features of training clips, a row for each caption.
      targets: (n, C) features of the captions.
      test: (V, D) features of held-out clips.
      asked: (T, C) features of the texts.
      ridge: Added to the diagonal of the normal equations.
    """
    mean, scale = train.mean(0), train.std(0) + 1e-6
    x, y = (train - mean) / scale, (test - mean) / scale
    centre = targets.mean(0)
    gram = x.T @ x + ridge * np.eye(x.shape[1], dtype=x.dtype)
    mapped = y @ np.linalg.solve(gram, x.T @ (targets - centre))
    return retrieval.cosine_scores(mapped, asked - centre)


def sentence_features(model: Any, text: Any, sentences: Sequence[str]) -> np.ndarray:
    """(n, C) MiniLM's own sentence features: the mean over tokens, at unit length."""
    import jax
    import jax.numpy as jnp

    from iv2_jax.data.row_texts import load_tokenizer
    from iv2_jax.models.text.bert import Bert

    bert = Bert(model.config.text)

    @jax.jit
    def encode(params: Any, ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = bert.apply({"params": params}, ids, mask, method=Bert.encode_text)
        mean = jnp.einsum("bld,bl->bd", hidden, mask) / mask.sum(axis=1, keepdims=True)
        return mean / jnp.linalg.norm(mean, axis=1, keepdims=True)

    ids, mask = load_tokenizer(text).encode_batch(sentences)
    size, rows = 64, []
    for start in range(0, len(ids), size):
        part = np.arange(start, start + size) % len(ids)  # the last batch is filled up
        params = model.params["text_encoder"]
        rows.append(np.asarray(encode(params, ids[part], mask[part].astype(np.float32))))
    return np.concatenate(rows)[: len(ids)]
