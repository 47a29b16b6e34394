"""The config of a stage-3 run, and its cross checks."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from iv2_jax.data.instruct.loading import LoadConfig
from iv2_jax.data.instruct.plan import RowConfig
from iv2_jax.data.instruct.talk import TalkConfig
from iv2_jax.errors import ConfigError
from iv2_jax.models.chat import ChatConfig
from iv2_jax.train.init_towers import TowerInit
from iv2_jax.train.stage import RunConfig

if TYPE_CHECKING:
    from iv2_jax.train.instruct import InstructStage


@dataclass(frozen=True)
class InstructLossConfig:
    """How the next-token loss is taken.

    Attributes:
        released_groups: 1: every target of the batch weighs the same. The original averages the
            means of its devices' micro-batches: the number of those, devices times accumulation
            steps, gives its loss (spec stage3 5.1, trap 32).
        logits_share: share of a batch's positions whose logits are in memory at once. Any gives
            the same numbers; one round does where no more positions are targets.
    """

    released_groups: int = 1
    logits_share: float = 0.25

    def __post_init__(self) -> None:
        if self.released_groups < 1:
            raise ConfigError(f"loss.released_groups must be >= 1, not {self.released_groups}")
        if not 0 < self.logits_share <= 1:
            raise ConfigError(f"loss.logits_share must be in (0, 1], not {self.logits_share}")

    def capacity(self, positions: int) -> int:
        """Positions whose logits are in memory at once."""
        return max(1, round(positions * self.logits_share))


@dataclass(frozen=True, kw_only=True)
class InstructConfig(RunConfig):
    """A stage-3 run: bridge pre-training, caption alignment or instruction tuning.

    Attributes:
        chat: The model.
        talk: What stands between files and model: tokenizers, template, frames, tiles.
        mix: Conversations to learn from: a mix (`.yaml`) or one file. Empty plans without data.
        eval_mix: Held-out conversations for the loss at every evaluation; empty for none.
        rows: Shapes of rows; `rows.global_batch` is the run's `batch_size`.
        load: Workers, caches and the limit of files that do not decode.
        loss: How the loss is taken.
        accumulate: Micro-batches that a batch is worked through in, one after the other; the loss
            and its gradient are those of the whole batch.
        init: Weights that parts start from, laid over each other in their order.
        frozen_parts_in_train_mode: Frozen parts drop paths and values like the others.
        keep_features_gb: Memory for what a frozen encoder gives of every clip, computed once before
            the first step instead of in every step; 0 for none. Every clip is then shown in one
            view, without augmentation.
    """

    chat: ChatConfig
    talk: TalkConfig
    mix: str = ""
    eval_mix: str = ""
    rows: RowConfig = field(default_factory=RowConfig)
    load: LoadConfig = field(default_factory=LoadConfig)
    loss: InstructLossConfig = field(default_factory=InstructLossConfig)
    accumulate: int = 1
    init: tuple[TowerInit, ...] = ()
    frozen_parts_in_train_mode: bool = False
    keep_features_gb: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval_data is not None:
            raise ConfigError(
                "eval_data is of other stages: give eval_mix, a file of conversations"
            )
        if self.accumulate < 1:
            raise ConfigError(f"accumulate must be >= 1, not {self.accumulate}")
        if self.keep_features_gb < 0:
            raise ConfigError(f"keep_features_gb must be >= 0, not {self.keep_features_gb}")
        if self.rows.global_batch not in (RowConfig().global_batch, self.batch_size):
            raise ConfigError(
                f"rows.global_batch={self.rows.global_batch} is not batch_size={self.batch_size}; "
                "leave it out"
            )
        rows = dataclasses.replace(self.rows, global_batch=self.batch_size)
        object.__setattr__(self, "rows", rows)
        if self.keep_features_gb and (self.talk.flip or not self.talk.fixed_augment):
            raise ConfigError(
                "keep_features_gb shows every clip in one view: set talk.augment to 'center' or "
                "'stretch', and talk.flip to False"
            )
        self._check_talk()

    def make_stage(self) -> InstructStage:
        """The stage."""
        from iv2_jax.train.instruct import InstructStage

        return InstructStage(self)

    def _check_talk(self) -> None:
        """What is asked of files fits the model."""
        talk, chat = self.talk, self.chat
        if chat.encoder is None:
            raise ConfigError("chat.encoder is None: training needs the video encoder")
        pairs = [
            (
                "talk.sequence.tokens_per_view",
                talk.sequence.tokens_per_view,
                chat.bridge.num_tokens,
            ),
            ("talk.size", talk.size, chat.encoder.image_size),
            ("talk.frames", talk.frames, chat.encoder.num_frames),
        ]
        for name, have, want in pairs:
            if have != want:
                raise ConfigError(f"{name}={have}, but the model has {want}")
        if talk.bridge_text != "none":
            if not chat.bridge.text:
                raise ConfigError(f"talk.bridge_text={talk.bridge_text!r} needs chat.bridge.text")
            if talk.bridge_length > chat.bridge.max_length:
                raise ConfigError(
                    f"talk.bridge_length={talk.bridge_length} is more than "
                    f"chat.bridge.max_length={chat.bridge.max_length}"
                )
        longest, bound = talk.sequence.max_length, chat.llm.context_length
        if longest > max(self.rows.lengths):
            raise ConfigError(
                f"talk.sequence.max_length={longest} does not fit rows.lengths={self.rows.lengths}"
            )
        if bound is not None and longest > bound:
            raise ConfigError(
                f"talk.sequence.max_length={longest} is more than chat.llm.context_length={bound}"
            )
