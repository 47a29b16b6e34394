"""Asks a chat model: likelihoods of options, and generated answers, over a set of questions.

`score_choices` and `answer_questions` take a set and give a list; `Asker` gives results as they
come, for sets that take hours. `answers_stats` compares what was answered.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from iv2_jax import pixels
from iv2_jax.data.instruct.sequence import SequenceBuilder
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.data.prompts import BridgeText
from iv2_jax.data.tokenizers.base import Tokenizer
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.eval.answers_batches import Prepared, Reader, Unread
from iv2_jax.eval.answers_pixels import ClipViews
from iv2_jax.eval.answers_prompts import AnswerPrompt, Question, Writer, get_prompt, stop_ids
from iv2_jax.eval.answers_stats import PairedResult, paired, swapped
from iv2_jax.eval.chat_runs import ChatModel
from iv2_jax.models import kinds
from iv2_jax.models.chat import Chat, generate_answers
from iv2_jax.models.decoding import GenerationConfig
from iv2_jax.models.llm import Llm
from iv2_jax.parallel import rules
from iv2_jax.parallel.mesh import BATCH_AXES, MeshConfig, make_mesh

__all__ = [
    "AnswerPrompt",
    "Asker",
    "OptionScores",
    "PairedResult",
    "Question",
    "Reply",
    "answer_questions",
    "paired",
    "score_choices",
    "swapped",
]

# Pixel statistics: the video encoder's own; or CLIP's, by which the original's notebooks normalise
# for models that were trained with ImageNet's (spec stage3 trap 10).
STATISTICS = ("model", "clip")
_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
MAX_NEW_TOKENS = 100  # spec stage3 11.1
_UNBOUNDED = 1 << 30  # positions, where the language model names no bound


@dataclasses.dataclass(frozen=True)
class OptionScores:
    """How likely a model finds each option of a question.

    Attributes:
      log_probs: float64 `(O,)`, natural log-probability of each option's scored tokens given the
        clip and the question; NaN where the question could not be asked.
      tokens: `(O,)` how many they are.
      answer: place of the right option.
      same: `(O,)` options that have the right one's text.
      reason: why it could not be asked; empty where it was.
    """

    log_probs: np.ndarray
    tokens: np.ndarray
    answer: int
    same: np.ndarray
    reason: str = ""

    def chosen(self, *, by_length: bool = False) -> int:
        """The most likely option; `by_length` divides by the number of its tokens."""
        if self.reason:
            raise ValueError(f"nothing was chosen: {self.reason}")
        return int(np.argmax(self.log_probs / self.tokens if by_length else self.log_probs))

    def right(self, *, by_length: bool = False) -> bool:
        """Whether the most likely option is right."""
        return bool(self.same[self.chosen(by_length=by_length)])

    @property
    def answer_log_prob(self) -> float:
        """Log-probability of the right option."""
        return float(self.log_probs[self.answer])


@dataclasses.dataclass(frozen=True)
class Reply:
    """A generated answer.

    Attributes:
      text: of the reply behind the answer prefix, special tokens left out.
      tokens: how many it has, the ending one included.
      ended: False if it was cut off at `max_new_tokens`.
      reason: why the question could not be asked; empty where it was.
    """

    text: str = ""
    tokens: int = 0
    ended: bool = True
    reason: str = ""


class AskOptions(Protocol):
    """What the options of every task on questions have in common; see `Asker`."""

    batch_size: int
    protocol: str
    statistics: str
    threads: int


class Asker:
    """A chat model that questions can be put to, on one or several devices of one host."""

    def __init__(
        self,
        model: Chat,
        params: Any,
        talk: TalkConfig,
        *,
        prompt: str | AnswerPrompt = "open",
        builder: SequenceBuilder | None = None,
        bridge: tuple[Tokenizer, BridgeText] | None = None,
        batch_size: int = 8,
        protocol: str = "run",
        statistics: str = "model",
        threads: int = 2,
        mesh: Mesh | None = None,
    ) -> None:
        """Puts the parameters on the devices.

        Args:
          model: the chat model.
          params: its parameters: host arrays are sharded over the mesh.
          talk: how clips and questions become arrays.
          prompt: how questions are put: name in `answers_prompts.PROMPTS`, or one.
          builder: of `talk`, if it was made already.
          bridge: of `talk.make_bridge()`, if it was made already.
          batch_size: questions at a time; rounded up to what the mesh splits.
          protocol: see `ClipViews`.
          statistics: that pixels are normalised with, one of `STATISTICS`.
          threads: that read clips.
          mesh: None takes one device.

        Raises:
          ConfigError: a name is not known, or there are several processes.
        """
        if statistics not in STATISTICS:
            known = nearest(statistics, STATISTICS)
            raise ConfigError(f"pixel statistics {statistics!r} are not known{known}")
        if jax.process_count() > 1:
            raise ConfigError("questions are asked by one process: run it on one host")
        if model.config.encoder is None:
            raise ConfigError("the model has no video encoder (config.encoder is None)")
        self.model, self._statistics = model, statistics
        self._mesh = make_mesh(MeshConfig(max_devices=1)) if mesh is None else mesh
        shards = math.prod(self._mesh.shape[axis] for axis in BATCH_AXES)
        self._params = _place(params, model, self._mesh)
        self._builder = talk.make_builder() if builder is None else builder
        self._talk, self._threads = talk, threads
        if bridge is None and model.config.bridge.text:
            bridge = talk.make_bridge()
        self.prompt = get_prompt(prompt) if isinstance(prompt, str) else prompt
        self._bridge, self._size = bridge, -(-batch_size // shards) * shards
        self._views = ClipViews(talk, protocol=protocol)

    @classmethod
    def of(
        cls, chat: ChatModel, options: AskOptions, *, prompt: str, mesh: Mesh | None = None
    ) -> Asker:
        """An asker of an opened chat model; errors as there."""
        return cls(
            chat.model,
            chat.params,
            chat.talk,
            prompt=prompt,
            builder=chat.builder,
            bridge=chat.bridge,
            batch_size=options.batch_size,
            protocol=options.protocol,
            statistics=options.statistics,
            threads=options.threads,
            mesh=mesh,
        )

    def _reader(self, new_tokens: int = 0) -> Reader:
        """Reads clips and writes questions; prompts leave room for so many tokens."""
        # Rows in training may be shorter than what the model can take.
        room = (self.model.config.llm.context_length or _UNBOUNDED) - new_tokens
        if room < 2:
            raise ConfigError(f"max_new_tokens={new_tokens} leaves no room in the model's context")
        sequence = dataclasses.replace(self._builder.config, max_length=room)
        return Reader(
            Writer(SequenceBuilder(sequence, self._builder.tokenizer), self._talk, self.prompt),
            self._views,
            batch_size=self._size,
            bridge=self._bridge,
            threads=self._threads,
        )

    def score(self, questions: Sequence[Question]) -> Iterator[tuple[int, OptionScores]]:
        """Yields (number of the question, its options' likelihoods) as they come.

        Args:
          questions: with options; those about one clip best stand together.
        """
        most = max((len(question.options) for question in questions), default=0)
        reader = self._reader()
        for rows in reader.batches(questions, score=True):
            if isinstance(rows, Unread):
                yield rows.number, _scores(questions[rows.number], None, rows.reason)
                continue
            arrays = self._arrays(reader, rows, most)
            count = max(len(row.sequences) for row in rows)
            media = arrays.pop("media")
            found = np.asarray(_score(self.model, self._params, media, arrays, count), np.float64)
            for row, values in zip(rows, found, strict=False):
                yield row.number, _scores(questions[row.number], (row, values))

    def answer(
        self,
        questions: Sequence[Question],
        generation: GenerationConfig | None = None,
        *,
        seed: int = 0,
    ) -> Iterator[tuple[int, Reply]]:
        """Yields (number of the question, the reply) as they come.

        Args:
          questions: with or without options; those about one clip best stand together.
          generation: how tokens are chosen; None: greedy, 100 tokens. Where `eos_ids` is the
            default, the template's and the tokenizer's own are taken.
          seed: of draws, if there are any; a question draws the same in whatever batch it stands.
        """
        config = generation or GenerationConfig(max_new_tokens=MAX_NEW_TOKENS)
        tokenizer = self._builder.tokenizer
        changes: dict[str, Any] = {"pad_id": max(tokenizer.pad_id, 0)}
        if config.eos_ids == GenerationConfig.eos_ids:
            changes["eos_ids"] = stop_ids(self._builder)
        config = dataclasses.replace(config, **changes)
        reader = self._reader(config.max_new_tokens)
        for rows in reader.batches(questions, score=False):
            if isinstance(rows, Unread):
                yield rows.number, Reply(reason=rows.reason)
                continue
            arrays = self._arrays(reader, rows, 1)
            keys = None
            if config.do_sample:
                size = len(arrays["tokens"])
                numbers = [row.number for row in rows] + [0] * (size - len(rows))
                root = jax.random.key(seed)
                keys = jax.vmap(lambda n, root=root: jax.random.fold_in(root, n))(
                    jnp.asarray(numbers)
                )
            out = generate_answers(
                self.model,
                self._params,
                config,
                *(arrays[name][:, 0] for name in ("tokens", "visual_index", "mask")),
                rng=keys,
                **arrays["media"],
            )
            tokens, lengths = np.asarray(out.tokens), np.asarray(out.lengths)
            for row, ids, length in zip(rows, tokens, lengths, strict=False):
                ids = ids[:length].tolist()
                ended = bool(ids) and ids[-1] in config.eos_ids
                text = tokenizer.decode(ids)
                yield row.number, Reply(text, int(length), ended)

    def _arrays(self, reader: Reader, rows: Sequence[Prepared], options: int) -> dict[str, Any]:
        """A batch on the devices, pixels normalised."""
        arrays = reader.arrays(rows, options, max(self._builder.tokenizer.pad_id, 0))
        whole = NamedSharding(self._mesh, PartitionSpec(BATCH_AXES))
        arrays = jax.device_put(arrays, jax.tree.map(lambda _: whole, arrays))
        if "video" in arrays["media"]:
            video = _normalize(self.model, arrays["media"]["video"], self._statistics)
            arrays["media"]["video"] = video
        return arrays


def score_choices(
    model: Chat,
    params: Any,
    talk: TalkConfig,
    questions: Sequence[Question],
    **options: Any,
) -> list[OptionScores]:
    """How likely a model finds the options of each question.

    Args:
      model: the chat model.
      params: its parameters.
      talk: how clips and questions become arrays.
      questions: with options.
      **options: of `Asker`: `prompt`, `batch_size`, `mesh`, ...

    Returns:
      One for each question, in their order; those that could not be asked have a `reason`.

    Raises:
      ConfigError: a question has no options, or an option of `Asker` does not fit.
    """
    for question in questions:
        if not question.options:
            raise ConfigError(f"question {question.id} has no options to score")
    asker = Asker(model, params, talk, **options)
    found = dict(asker.score(questions))
    return [found[number] for number in range(len(questions))]


def answer_questions(
    model: Chat,
    params: Any,
    talk: TalkConfig,
    questions: Sequence[Question],
    *,
    generation: GenerationConfig | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Reply]:
    """Generates an answer to each question.

    Args:
      model: the chat model.
      params: its parameters.
      talk: how clips and questions become arrays.
      questions: with or without options.
      generation: see `Asker.answer`.
      seed: see `Asker.answer`.
      **options: of `Asker`: `prompt`, `batch_size`, `mesh`, ...

    Returns:
      One for each question, in their order; those that could not be asked have a `reason`.
    """
    asker = Asker(model, params, talk, **options)
    found = dict(asker.answer(questions, generation, seed=seed))
    return [found[number] for number in range(len(questions))]


def _scores(
    question: Question, found: tuple[Prepared, np.ndarray] | None, reason: str = ""
) -> OptionScores:
    """A question's likelihoods without what filled its row up."""
    count = len(question.options)
    same = np.array([option == question.answer for option in question.options])
    if found is None:
        return OptionScores(
            np.full(count, np.nan), np.zeros(count, int), question.number, same, reason
        )
    row, values = found
    tokens = np.array([len(places) for places in row.places])
    return OptionScores(values[:count], tokens, question.number, same)


def _place(params: Any, model: Chat, mesh: Mesh) -> Any:
    """Host arrays sharded over the mesh by the package's table; device arrays as they are."""
    if all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params)):
        return params
    tree, _ = rules.shardings(kinds.of(model.config).boxed_params(model.config), mesh)
    return jax.tree.map(jax.device_put, params, tree)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _normalize(model: Chat, video: jax.Array, statistics: str) -> jax.Array:
    """Pixels as the video encoder takes them."""
    if statistics == "clip":
        return pixels.normalize(video, _CLIP_MEAN, _CLIP_STD)
    return model.config.encoder.normalize(video)


@functools.partial(jax.jit, static_argnums=0)
def _score(
    model: Chat,
    params: Any,
    media: Mapping[str, jax.Array],
    arrays: Mapping[str, jax.Array],
    count: int | jax.Array,
) -> jax.Array:
    """Log-probabilities `(b, O)` of what `wanted` names; the first `count` options alone.

    The clips are encoded once; the options go through the language model one after the other, so
    that memory does not grow with their number, and logits are made at scored places alone.
    """
    variables, llm = {"params": params}, Llm(model.config.llm)
    visual = model.apply(variables, **media, method="visual_tokens") if media else None

    def option(at: jax.Array, sums: jax.Array) -> jax.Array:
        one = {
            name: jax.lax.dynamic_index_in_dim(array, at, axis=1, keepdims=False)
            for name, array in arrays.items()
        }
        x = model.apply(variables, one["tokens"], one["visual_index"], visual, method="embed")
        only_llm = {"params": params["llm"]}
        out = llm.apply(only_llm, x, mask=one["mask"], method="hidden")
        hidden = jnp.take_along_axis(out.hidden, one["places"][..., None], axis=1)
        logits = llm.apply(only_llm, hidden, method="logits")
        wanted = jnp.maximum(one["wanted"], 0)[..., None]
        log_probs = jnp.take_along_axis(jax.nn.log_softmax(logits), wanted, axis=-1)[..., 0]
        total = jnp.where(one["wanted"] >= 0, log_probs, 0.0).sum(axis=-1)
        return sums.at[:, at].set(total)

    empty = jnp.zeros(arrays["tokens"].shape[:2], jnp.float32)
    return jax.lax.fori_loop(0, count, option, empty)
