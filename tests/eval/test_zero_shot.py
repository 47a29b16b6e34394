"""Zero-shot recognition and multiple choice."""

from __future__ import annotations

import numpy as np
import pytest

from iv2_jax.errors import ConfigError, DataError
from iv2_jax.eval import retrieval, zero_shot
from iv2_jax.eval.retrieval_task import evaluate_retrieval
from iv2_jax.models import stage2
from tests.eval import two_towers

VISUAL = stage2.ZOO["test_tiny_stage2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return two_towers.write_set(tmp_path_factory.mktemp("set")).parent


@pytest.fixture(scope="module")
def params():
    return two_towers.params_of(VISUAL)


def test_recognition_by_templates(folder, params):
    data = two_towers.data_config(folder)
    result = zero_shot.evaluate_zero_shot(
        params, VISUAL, data, "label", templates=["a {}", "{} is"]
    )
    assert result.classes == ("cat", "other thing")
    np.testing.assert_array_equal(result.labels, [1, 0, 1, 0, 1, 1])
    assert result.metrics["chance/top1"] == 50
    assert result.metrics["top5"] == 100
    assert result.metrics["top1"] == pytest.approx(
        100 * np.mean(result.scores.argmax(1) == result.labels)
    )
    # Retrieval with the same words gives the same cosines.
    asked = ["a cat", "cat is", "a other thing", "other thing is"]
    listed = two_towers.write_set(folder / "prompts", [(text,) for text in asked]).parent
    for i in range(4):
        (listed / f"clip{i}.mp4").write_bytes((folder / f"clip{i}.mp4").read_bytes())
    cosines = evaluate_retrieval(params, VISUAL, two_towers.data_config(listed)).scores
    expected = cosines.reshape(4, 2, 2).mean(-1)
    np.testing.assert_allclose(result.scores[:4], expected, atol=1e-5)


def test_bad_requests(folder, params):
    data = two_towers.data_config(folder)
    with pytest.raises(DataError, match="did you mean 'label'"):
        zero_shot.evaluate_zero_shot(params, VISUAL, data, "labels")
    with pytest.raises(DataError, match="'other thing' of label 'label' is not listed"):
        zero_shot.evaluate_zero_shot(params, VISUAL, data, "label", classes=["cat", "dog"])
    with pytest.raises(ConfigError, match="where the class name goes"):
        zero_shot.evaluate_zero_shot(params, VISUAL, data, "label", templates=["a photo"])


def test_a_class_scores_by_the_mean_of_its_prompts():
    media = np.array([[1.0, 0.0]])
    texts = np.array([[[3.0, 0.0], [0.0, 1.0]], [[1.0, 1.0], [5.0, 5.0]]])
    np.testing.assert_allclose(zero_shot.class_scores(media, texts), [[0.5, 2**-0.5]], rtol=1e-6)


def test_accuracies():
    scores = np.eye(7)[[0, 1, 2, 2]]
    found = zero_shot.accuracy(scores, np.array([0, 1, 2, 1]))
    assert found["top1"] == 75
    assert found["class_mean"] == pytest.approx(100 * (1 + 0.5 + 1) / 3)
    assert found["avg"] == (found["top1"] + found["top5"]) / 2


def test_mean_average_precision():
    scores = np.array([[0.9, 0.1, 0.5], [0.8, 0.9, 0.4], [0.7, 0.5, 0.3]])
    labels = np.array([[1, 0, 0], [0, 0, 0], [1, 1, 0]])
    # Class 0: right at places 1 and 3; class 1: at 2; class 2 has nothing right.
    expected = 100 * ((1 + 2 / 3) / 2 + 1 / 2 + 0) / 3
    assert zero_shot.mean_average_precision(scores, labels) == pytest.approx(expected)
    with pytest.raises(DataError, match="differ in shape"):
        zero_shot.mean_average_precision(scores, labels[:2])


def test_multiple_choice(folder, params):
    data = two_towers.data_config(folder)
    options = [("a red ball", "A cat!", "dog"), *[("cat", "a dog", "two man")] * 5]
    index, probabilities = zero_shot.evaluate_choices(params, VISUAL, data, options)
    np.testing.assert_array_equal(index, np.arange(6))
    np.testing.assert_allclose(probabilities.sum(1), 1, rtol=1e-5)
    answers = probabilities.argmax(1)
    assert zero_shot.choice_accuracy(probabilities, answers) == 100
    assert zero_shot.choice_accuracy(probabilities, (answers + np.eye(6, dtype=int)[0]) % 3) < 100
    # The same texts through `retrieval`, at the model's temperature.
    texts = ["a red ball", "a cat", "dog", "cat", "a dog", "two man"]
    listed = two_towers.write_set(folder / "options", [(text,) for text in texts]).parent
    for i in range(6):
        (listed / f"clip{i}.mp4").write_bytes((folder / f"clip{i}.mp4").read_bytes())
    cosines = evaluate_retrieval(params, VISUAL, two_towers.data_config(listed)).scores
    picked = np.stack([cosines[0, :3], *cosines[1:, 3:]])
    np.testing.assert_allclose(probabilities, retrieval.softmax(picked / 0.07), atol=1e-4)
    with pytest.raises(DataError, match="same number"):
        zero_shot.evaluate_choices(params, VISUAL, data, [("a",), ("a", "b")])
