"""How a question about a clip becomes the arrays that a chat model takes.

One `TalkConfig` stands between files and model, in training, in evaluation and in a chat, so that a
model is asked in the way it was taught. A run keeps it in its `config.json`.
"""

from __future__ import annotations

import dataclasses

from iv2_jax.data import sampling, tokenizers
from iv2_jax.data.data_config import DataConfig
from iv2_jax.data.instruct.conversations import Conversation
from iv2_jax.data.instruct.sequence import SequenceBuilder, SequenceConfig
from iv2_jax.data.package_files import resolve
from iv2_jax.data.prompts import BridgeText
from iv2_jax.data.tiles import TilingConfig
from iv2_jax.data.tokenizers.base import Tokenizer
from iv2_jax.data.tokenizers.beside import tokenizer_of
from iv2_jax.data.tokenizers.language_model import LlmTokenizer
from iv2_jax.errors import ConfigError, nearest

VISUAL = ("image", "video")


@dataclasses.dataclass(frozen=True)
class TalkConfig:
    """Tokenizers, template, frames and views of a chat model.

    Attributes:
      tokenizer: of the language model: a `.gguf` file, a folder of Hugging Face, a `tok*.bin` of
        llama2.c, or `package:NAME/FILE`.
      sequence: template, length, visual tokens of a view, released quirks.
      bridge_tokenizer: BERT's `vocab.txt`, needed where `bridge_text` is not `none`.
      bridge_text: what the Q-Former is told: `none`, `instruction` or `instruction+question`
        (spec stage3 2.4).
      bridge_length: ids of that text, padded on the left as released; padding takes positions.
      frames: T, frames of a video; an image has one.
      size: side of a view in pixels.
      sampling: rule that picks frames, see `data.sampling.rule`; `chat` draws as the released
        training does and takes the frames of the released `chat()` otherwise (spec stage3 4.4).
      augment: of training: `random_resized_crop` as released, which leaves `center` otherwise; or
        `center`, `stretch` always.
      crop_area: smallest and largest share of the picture that `random_resized_crop` takes.
      flip: mirror half of the training clips, as released although answers say left and right
        (spec stage3 trap 21).
      tiling: cuts clips into tiles and a global view of `tiling.tile_size`, without augmentation.
      instruction: sentence on the task where a conversation or a user gives none.

    Raises:
      ConfigError: a value is not known, out of range or does not fit another.
    """

    tokenizer: str
    sequence: SequenceConfig = dataclasses.field(default_factory=SequenceConfig)
    bridge_tokenizer: str = ""
    bridge_text: str = "none"
    bridge_length: int = 128
    frames: int = 8
    size: int = 224
    sampling: str = "chat"
    augment: str = "random_resized_crop"
    crop_area: tuple[float, float] = (0.5, 1.0)
    flip: bool = False
    tiling: TilingConfig | None = None
    instruction: str = ""

    def __post_init__(self) -> None:
        if not self.tokenizer:
            raise ConfigError("talk.tokenizer is empty: name the language model's tokenizer")
        known = [mode.value for mode in BridgeText]
        if self.bridge_text not in known:
            raise ConfigError(
                f"talk.bridge_text {self.bridge_text!r} is not known"
                f"{nearest(self.bridge_text, known)}"
            )
        if self.bridge_text != BridgeText.NONE.value and not self.bridge_tokenizer:
            raise ConfigError(
                f"talk.bridge_text={self.bridge_text!r} needs talk.bridge_tokenizer, the vocab.txt "
                "of bert-base-uncased"
            )
        for name in ("frames", "size", "bridge_length"):
            if getattr(self, name) < 1:
                raise ConfigError(f"talk.{name} must be at least 1, is {getattr(self, name)}")
        if self.tiling is not None and self.tiling.tile_size != self.size:
            raise ConfigError(
                f"talk.size={self.size} is not talk.tiling.tile_size={self.tiling.tile_size}: "
                "tiles are what the video encoder sees"
            )
        sampling.rule(self.sampling)
        self.view_config("video", train=True)

    @property
    def fixed_augment(self) -> bool:
        """Whether training crops and resizes as evaluation does."""
        return self.augment in ("center", "stretch")

    def view_config(self, kind: str, *, train: bool = False) -> DataConfig:
        """How the frames of a clip are picked, cropped and resized.

        Args:
          kind: `video` or `image`.
          train: with the draws of training; otherwise the same view every time.

        Raises:
          ConfigError: the kind is another.
        """
        if kind not in VISUAL:
            raise ConfigError(f"no view of {kind!r}{nearest(kind, VISUAL)}")
        return DataConfig(
            media=kind,
            num_frames=self.frames if kind == "video" else 1,
            sampling=self.sampling,
            size=self.size,
            augment=self.augment if train or self.fixed_augment else "center",
            crop_area=self.crop_area,
            flip=self.flip and train,
            released_flip=self.flip and train,
            eval=not train,
        )

    def make_tokenizer(self) -> LlmTokenizer:
        """The language model's tokenizer.

        Raises:
          DataError: it is not there or its files contradict each other.
          ConfigError: a library is not installed.
        """
        return tokenizer_of(self.tokenizer)

    def make_builder(self, tokenizer: LlmTokenizer | None = None) -> SequenceBuilder:
        """What turns conversations into sequences; `tokenizer` if it was made already."""
        return SequenceBuilder(self.sequence, tokenizer or self.make_tokenizer())

    def make_bridge(self) -> tuple[Tokenizer, BridgeText] | None:
        """Tokenizer of the Q-Former and what it is told; None for nothing.

        Raises:
          DataError: the vocabulary is not there or is another.
          ConfigError: a library is not installed.
        """
        mode = BridgeText(self.bridge_text)
        if mode is BridgeText.NONE:
            return None
        tokenizer = tokenizers.load(
            "bert",
            resolve(self.bridge_tokenizer),
            max_length=self.bridge_length,
            trailing_sep=True,
            side="left",
            extra_tokens=("[DEC]",),
        )
        return tokenizer, mode

    def instructed(self, conversation: Conversation) -> Conversation:
        """The conversation with `instruction` where its turns have none."""
        if not self.instruction:
            return conversation
        turns = tuple(
            turn if turn.instruction else dataclasses.replace(turn, instruction=self.instruction)
            for turn in conversation.turns
        )
        return dataclasses.replace(conversation, turns=turns)
