"""What stages that train on media and their captions have in common.

`PairConfig` has the data of several media types, the weights to start from and the retrieval at
every evaluation; `PairStage` loads the batches, starts the model and evaluates it.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import jax
import numpy as np
from jax.sharding import Mesh

from iv2_jax.data import mixing
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.modalities import WITH_PICTURES, WITH_SOUND
from iv2_jax.data.pipeline import make_loader
from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.models.video_encoder import EncoderConfig
from iv2_jax.train import optim
from iv2_jax.train.batches import abstract_batches
from iv2_jax.train.init_towers import TowerInit, load_towers
from iv2_jax.train.stage import RunConfig, Stage


@dataclass(frozen=True)
class RetrievalConfig:
    """Zero-shot retrieval over `eval_data` at every evaluation (spec stage2 9.1).

    Attributes:
        enabled: whether to evaluate it.
        media: what is looked for; empty takes `eval_data`'s. `video` looks among all clips where
            `eval_data` is `audio_video`, whose fused vector only clips with sound have.
        rerank_top: how many of the best are judged again by the matching head; 0 for none.
        batch_size: clips encoded at once; 0 takes the run's.
    """

    enabled: bool = True
    media: str = ""
    rerank_top: int = 0
    batch_size: int = 0


@dataclass(frozen=True, kw_only=True)
class PairConfig(RunConfig):
    """A run on media and captions.

    Attributes:
        data: Training data by media type, and how they are mixed.
        init: Weights that towers start from, laid over each other in their order.
        frozen_towers_in_train_mode: Frozen towers drop paths and values like the others, as in the
            released code (spec stage2 11.10).
        retrieval: Retrieval over `eval_data` at every evaluation.
    """

    data: mixing.MixConfig
    init: tuple[TowerInit, ...] = ()
    frozen_towers_in_train_mode: bool = False
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)

    @property
    @abc.abstractmethod
    def model(self) -> Any:
        """The model's config."""

    def check_views(self, encoder: EncoderConfig) -> None:
        """Refuses data whose pictures are not the encoder's, or that have no captions.

        Raises:
          ConfigError: Names the field.
        """
        for name, data in self.data.media.items():
            _check_view(f"data.media.{name}", data, name, encoder)
        if self.eval_data is not None:
            _check_view("eval_data", self.eval_data, self.eval_data.media, encoder)

    def loaded(self) -> dict[str, DataConfig]:
        """Data configs by the name of their field."""
        named = {f"data.media.{name}": data for name, data in self.data.media.items()}
        return named | ({"eval_data": self.eval_data} if self.eval_data is not None else {})

    def check_pictures(self, encoder: EncoderConfig, caption: str) -> None:
        """`check_views` for stages of images and videos, in turns, with one caption.

        Raises:
          ConfigError: Names the field.
        """
        if self.data.mode != "alternate":
            raise ConfigError(
                f"data.mode {self.data.mode!r}: images and videos alternate in this stage"
            )
        self.check_views(encoder)
        for name, data in self.loaded().items():
            if data.media not in ("image", "video"):
                raise ConfigError(f"{name}.media {data.media!r}: this stage takes image and video")
            if caption not in data.text.captions:
                raise ConfigError(
                    f"loss.caption {caption!r} is not in {name}.text.captions "
                    f"{list(data.text.captions)}"
                )


def _check_view(where: str, data: DataConfig, media: str, encoder: EncoderConfig) -> None:
    """Pictures are of the encoder's size and number, and there are captions."""
    if data.media != media:
        raise ConfigError(f"{where}.media must be {media!r}, not {data.media!r}")
    if media in WITH_PICTURES:
        frames = 1 if media == "image" else encoder.num_frames
        pairs = (("size", data.size, encoder.image_size), ("num_frames", data.frames, frames))
        for name, have, want in pairs:
            if have != want:
                raise ConfigError(f"{where}.{name} must be {want}, not {have}")
    if data.text is None:
        raise ConfigError(f"{where}.text must be given: media are compared with captions")


class PairStage(Stage):
    """A model of media and text; subclasses add the loss."""

    host_arrays: ClassVar[tuple[str, ...]] = ("index", "replaced", "media")

    def __init__(self, config: PairConfig) -> None:
        self.config = config
        self.model = kinds.of(config.model).build(config.model)

    def trained_paths(self) -> list[str]:
        """Paths of the parameters that are trained.

        Raises:
          ConfigError: A pattern of `optimizer.freeze` or `open` matches nothing.
        """
        params = kinds.of(self.config.model).abstract_params(self.config.model)
        return optim.trained_paths(self.config.optimizer, params)

    def init_params(self, rng: jax.Array) -> Any:
        """Fresh parameters (boxed)."""
        return kinds.of(self.config.model).init_params(self.config.model, rng)

    def starting_params(self) -> Any:
        """What `init` names, as a part of the parameter tree."""
        return load_towers(self.config.init, self.config.model)

    def abstract_frozen(self) -> Any:
        """No frozen models beside the trained one."""
        return {}

    def abstract_batches(self, batch_size: int) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
        """Arrays of each media type's batches."""
        return abstract_batches(self.config.data, batch_size)

    def asked_caption(self) -> str:
        """Name of the caption that asks in retrieval; "" takes the first of the data's."""
        return ""

    def evaluate(self, params: Any, frozen: Any, mesh: Mesh) -> dict[str, float]:
        """Zero-shot retrieval over `eval_data`."""
        from iv2_jax.eval.retrieval_task import RetrievalOptions, evaluate_retrieval

        del frozen
        config = self.config
        if config.eval_data is None or not config.retrieval.enabled:
            return {}
        data = config.eval_data
        if config.retrieval.media:
            media = config.retrieval.media
            audio = data.audio if media in WITH_SOUND else None
            data = dataclasses.replace(data, media=media, audio=audio)
        result = evaluate_retrieval(
            params,
            config.model,
            data,
            rerank_top=config.retrieval.rerank_top,
            mesh=mesh,
            seed=config.seed,
            batch_size=config.retrieval.batch_size or config.batch_size,
            options=RetrievalOptions(caption=self.asked_caption()),
        )
        return result.metrics

    def train_batches(self, start_step: int) -> Iterator[dict[str, np.ndarray]]:
        """Endless training batches from `start_step` on."""
        return mixing.make_mixed_loader(
            self.config.data,
            seed=self.config.seed,
            global_batch=self.config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            start_step=start_step,
        )

    def eval_batches(self) -> Iterator[dict[str, np.ndarray]]:
        """The held-out clips once, in order."""
        if self.config.eval_data is None:
            return (batch for batch in ())
        return make_loader(
            dataclasses.replace(self.config.eval_data, eval=True),
            seed=self.config.seed,
            global_batch=self.config.batch_size,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
