"""A chat model made ready for talking: weights on the device, frames fitted, programs bounded.

Prompts are padded to a few lengths, and the visual tokens of a clip are made once and kept, so that
after the first answer of a length nothing is compiled or encoded again.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from iv2_jax.data.dialogue import bucket_length, pad_batch
from iv2_jax.data.instruct.batches import bridge_text
from iv2_jax.data.instruct.conversations import Conversation, Turn
from iv2_jax.data.instruct.sequence import SequenceBuilder, TokenSequence
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.errors import ConfigError
from iv2_jax.eval.chat_runs import ChatModel, open_chat, with_views
from iv2_jax.models import kinds, lora
from iv2_jax.models.chat import Chat, ChatConfig
from iv2_jax.models.decoding import GenerationConfig, unstacked
from iv2_jax.models.layers import Precision
from iv2_jax.models.llm import Llm
from iv2_jax.models.streaming import stream
from iv2_jax.parallel import rules
from iv2_jax.parallel.mesh import MeshConfig, make_mesh
from iv2_jax.talk.clip import SeenClip

POSITIONS = 4096  # of prompt and answer, where the language model names no bound
_SHORTEST = 256  # of the lengths that prompts are padded to (spec stage3 5.4)
_UNBOUNDED = 1 << 30  # the builder's max_length here: what is too long is judged with the history


@dataclasses.dataclass(frozen=True)
class AnswerOptions:
    """How answers are chosen.

    Attributes:
      max_tokens: most tokens of an answer.
      temperature: 0 takes the likeliest token each time; above, divides the logits of the draws.
      top_p: draws among the likeliest tokens that reach this probability together.
      seed: of the draws; the same seed, clip and questions give the same answers.

    Raises:
      ConfigError: a value is out of range.
    """

    max_tokens: int = 200
    temperature: float = 0.0
    top_p: float = 0.9
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"--max-tokens {self.max_tokens}: must be at least 1")
        if not 0 <= self.temperature < math.inf:
            raise ConfigError(f"--temperature {self.temperature}: must be a number from 0 on")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"--top-p {self.top_p}: must be above 0 and at most 1")
        if not 0 <= self.seed < 1 << 63:
            raise ConfigError(f"--seed {self.seed}: must be a whole number from 0 on")


class TalkModel:
    """A chat model that answers; one for any number of conversations.

    Attributes:
      name: where it comes from.
      config: its shape as it runs: frames fitted, adapters merged.
      talk: how clips and questions become arrays.
      builder: turns conversations into sequences of any length.
      context: positions that prompt and answer may have together.
      eos_ids: tokens that end an answer.
    """

    def __init__(
        self,
        run: ChatModel,
        *,
        frames: int | None = None,
        tiles: int | None = None,
        instruction: str | None = None,
        context: int | None = None,
        dtype: str | None = None,
        devices: Sequence[jax.Device] = (),
    ) -> None:
        """Makes an opened model ready.

        Args:
          run: of `eval.chat_runs.open_chat`.
          frames: of a video; the encoder's positions are interpolated. None as trained.
          tiles: most tiles of a clip beside the whole; 0 for one centre view. None as trained.
          instruction: system text; None as trained.
          context: see the attribute; None for the language model's own bound, else 4096.
          dtype: `bfloat16` or `float32` for weights and products; None as the checkpoint says.
          devices: that the weights are split over; none or one for the default one.

        Raises:
          ConfigError: the model sees no clips, or a value does not fit it.
        """
        if frames is not None and frames < 1:
            raise ConfigError(f"--frames {frames}: must be at least 1")
        if tiles is not None and tiles < 0:
            raise ConfigError(f"--tiles {tiles}: must be from 0 on")
        run = with_views(run, frames=frames or run.talk.frames, tiles=tiles)
        config, params, talk = run.config, run.params, run.talk
        if instruction is not None:
            talk = dataclasses.replace(talk, instruction=instruction)
        config, params = _merged(config, params)
        if dtype is not None:
            config, params = _in_dtype(config, params, dtype)
        _check_views(config, talk, run.name)
        self.name, self.config, self.talk = run.name, config, talk
        self._bridge = run.bridge
        unbounded = dataclasses.replace(talk.sequence, max_length=_UNBOUNDED)
        self.builder = SequenceBuilder(unbounded, run.builder.tokenizer)
        bound = config.llm.context_length
        self.context = (
            context if context is not None else bound or max(POSITIONS, talk.sequence.max_length)
        )
        if self.context < 2 or (bound is not None and self.context > bound):
            raise ConfigError(
                f"--context {self.context}: must be from 2 to the model's {bound or 'own bound'}"
            )
        self.eos_ids = self._ends()
        self._compiled: set[tuple[int, GenerationConfig]] = set()
        self._params = _placed(config, params, devices)
        self._llm = Llm(config.llm)

    @property
    def tokenizer(self) -> Any:
        """The language model's tokenizer."""
        return self.builder.tokenizer

    def _ends(self) -> tuple[int, ...]:
        """`eos_id`, and the special tokens that the template puts behind an answer.

        Raises:
          DataError: the template is another language model's.
        """
        self.builder.build(Conversation((Turn("a", "b"),)))  # says so if the template misfits
        tail = self.builder.template.answer.partition("{answer}")[2]
        special = set(self.tokenizer.specials.values())
        found = [token for token in self.tokenizer.tokenize(tail) if token in special]
        return tuple(dict.fromkeys([self.tokenizer.eos_id, *found]))

    def buckets(self) -> list[int]:
        """Lengths that prompts are padded to: powers of two, and the context."""
        doubled = (_SHORTEST << n for n in range(32))
        return [*(length for length in doubled if length < self.context), self.context]

    def told(self, conversation: Conversation) -> str | None:
        """What the Q-Former is told of a conversation; None for nothing."""
        return bridge_text(conversation, self._bridge[1]) if self._bridge else None

    def visual_tokens(self, clip: SeenClip, told: str | None) -> jax.Array:
        """Visual tokens `(1, V * K, width)` of a clip, `told` given to the Q-Former."""
        text: dict[str, Any] = {}
        if told is not None and self._bridge is not None:
            ids, mask = self._bridge[0].encode_batch([told])
            text = {"bridge_ids": jnp.asarray(ids), "bridge_mask": jnp.asarray(mask)}
        return _visual_tokens(Chat(self.config), self._params, jnp.asarray(clip.views)[None], text)

    def stream(
        self,
        sequence: TokenSequence,
        visual: jax.Array | None,
        options: AnswerOptions,
        rng: jax.Array,
        *,
        chunk: int = 2,
    ) -> Iterator[list[int]]:
        """Gives an answer's tokens as they come, the ending one included.

        Args:
          sequence: the prompt; with the answer it must fit the context.
          visual: of `visual_tokens`; None for text alone.
          options: how tokens are chosen.
          rng: key of the draws.
          chunk: tokens between two yields.
        """
        length, config = self._program(sequence, options)
        self._compiled.add((length, config))
        row = pad_batch([sequence], length, max(self.tokenizer.pad_id, 0))
        embeddings = _embed(
            Chat(self.config), self._params, row["tokens"], row["visual_index"], visual
        )
        steps = stream(
            self._llm,
            self._params["llm"],
            config,
            embeddings=embeddings,
            mask=row["mask"],
            rng=rng,
            chunk=chunk,
        )
        return (rows[0] for rows in steps)

    def is_compiled(self, sequence: TokenSequence, options: AnswerOptions) -> bool:
        """Whether an answer to such a prompt was begun before, so that its program is there."""
        return self._program(sequence, options) in self._compiled

    def _program(
        self, sequence: TokenSequence, options: AnswerOptions
    ) -> tuple[int, GenerationConfig]:
        """What a program is compiled for: the prompt's padded length and how tokens are chosen."""
        sample = options.temperature > 0
        config = GenerationConfig(
            max_new_tokens=options.max_tokens,
            eos_ids=self.eos_ids,
            do_sample=sample,
            temperature=options.temperature if sample else 1.0,
            top_p=options.top_p if sample else 1.0,
        )
        return bucket_length([sequence], self.buckets()), config


def open_model(
    path: str,
    *,
    tokenizer: str = "",
    template: str = "",
    ema: bool = False,
    frames: int | None = None,
    tiles: int | None = None,
    instruction: str | None = None,
    context: int | None = None,
    dtype: str | None = None,
    devices: Sequence[jax.Device] = (),
) -> TalkModel:
    """Opens a checkpoint for talking; arguments as of `open_chat` and `TalkModel`."""
    run = open_chat(path, tokenizer=tokenizer, template=template, ema=ema)
    return TalkModel(
        run,
        frames=frames,
        tiles=tiles,
        instruction=instruction,
        context=context,
        dtype=dtype,
        devices=devices,
    )


def _placed(config: ChatConfig, params: Any, devices: Sequence[jax.Device]) -> Any:
    """Parameters on one device, or split over several by the package's table.

    As many devices as the key heads divide over share each layer's work, which the single row of
    a batch does not divide otherwise; beyond that they hold parts of the weights.
    """
    if len(devices) < 2:
        on_cpu = jax.default_backend() == "cpu"
        llm = unstacked(params["llm"]) if on_cpu else params["llm"]
        return jax.device_put({**params, "llm": llm})
    decoder = config.llm.decoder
    tensor = math.gcd(len(devices), decoder.num_kv_heads or decoder.num_heads)
    # What does not divide is whole everywhere: no error to talk with.
    shape = MeshConfig(data=1, fsdp=-1, tensor=tensor, allow_replicated=(".*",))
    boxed = kinds.of(config).boxed_params(config)
    tree, _ = rules.shardings(boxed, make_mesh(shape, devices), shape)
    return jax.device_put(params, tree)


@partial(jax.jit, static_argnames="model")
def _visual_tokens(model: Chat, params: Any, pixels: jax.Array, text: Any) -> jax.Array:
    """Visual tokens of pixels `(1, V, T, S, S, 3)` in 0..255."""
    video = model.config.encoder.normalize(pixels)
    return model.apply({"params": params}, video, **text, method="visual_tokens")


@partial(jax.jit, static_argnames="model")
def _embed(
    model: Chat, params: Any, tokens: jax.Array, visual_index: jax.Array, visual: jax.Array | None
) -> jax.Array:
    """What enters the language model."""
    return model.apply({"params": params}, tokens, visual_index, visual, method="embed")


def _merged(config: ChatConfig, params: Any) -> tuple[ChatConfig, Any]:
    """Adapters folded into float32 kernels, which makes decoding faster; else as it is."""
    adapters = config.llm.decoder.lora
    dtypes = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(params["llm"])}
    if adapters is None or dtypes != {np.dtype(np.float32)}:
        return config, params
    merged = lora.merge(params["llm"], adapters)
    return dataclasses.replace(config, llm=config.llm.without_lora()), {**params, "llm": merged}


def _in_dtype(config: ChatConfig, params: Any, dtype: str) -> tuple[ChatConfig, Any]:
    """Weights and products in a dtype."""
    precision = Precision(dtype, dtype)
    decoder = dataclasses.replace(config.llm.decoder, precision=precision)
    config = dataclasses.replace(
        config,
        encoder=dataclasses.replace(config.encoder, precision=precision),
        bridge=dataclasses.replace(config.bridge, precision=precision),
        llm=dataclasses.replace(config.llm, decoder=decoder),
    )
    return config, jax.tree.map(lambda leaf: leaf.astype(jnp.dtype(dtype)), params)


def _check_views(config: ChatConfig, talk: TalkConfig, name: str) -> None:
    """Refuses a way to talk that was made for another model."""
    for field, said, wanted in (
        ("talk.size", talk.size, config.encoder.image_size),
        ("talk.sequence.tokens_per_view", talk.sequence.tokens_per_view, config.bridge.num_tokens),
    ):
        if said != wanted:
            raise ConfigError(f"{name}: {field} is {said}, the model has {wanted}")
