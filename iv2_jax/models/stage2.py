"""The stage-2 models: video, text and, in one layout, audio, brought together (spec stage2 4).

Each kind of input has a tower, a linear map of its pooled vector into a joint space, where pairs
are contrasted, and tokens that the text tower's fusion layers read, for matching and for masked
language modelling. Losses are in `objectives`; the methods here give what they need.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from flax import linen as nn

from iv2_jax.errors import ConfigError
from iv2_jax.models import zoo
from iv2_jax.models.audio.beats import ZOO as BEATS_ZOO
from iv2_jax.models.audio.beats import Beats, BeatsConfig
from iv2_jax.models.layers import LayerNorm, Linear, Precision, boxed
from iv2_jax.models.student import Student, StudentConfig
from iv2_jax.models.text.bert import ZOO as BERT_ZOO
from iv2_jax.models.text.bert import Bert, BertConfig
from iv2_jax.models.text.bert_layers import Versions


@dataclasses.dataclass(frozen=True)
class Stage2Config:
    """A stage-2 model: its towers and what joins them (spec stage2 1 and 4).

    The visual layout (1B) gives the vision tokens to the fusion layers as they are. The audiovisual
    layout (6B) maps and norms the tokens of every tower first, so that vision and audio tokens can
    stand in one sequence.

    Attributes:
        vision: the video encoder with its alignment decoders, a student that takes images.
        text: the text tower; its `context_width` is the width of the tokens it reads.
        audio: the audio encoder, or None.
        joint_width: size of the joint space.
        project_tokens: map the towers' tokens to `text.context_width`, the audiovisual layout.
        av_fusion: joins the audio's and the video's vectors into one for contrast with the text.
        audio_matching: has a matching head for audio.
        av_matching: has a matching head for audio and video together; needs `av_fusion`, whose
            vectors its negatives are found by.
        temp_init: starting temperature; similarities are divided by it.
        contrast_bias_init: starting bias of the sigmoid loss, such as -10; None for no bias.

    Raises:
        ConfigError: a field does not fit another; the message names both.
    """

    vision: StudentConfig
    text: BertConfig
    audio: BeatsConfig | None = None
    joint_width: int = 512
    project_tokens: bool = False
    av_fusion: bool = False
    audio_matching: bool = False
    av_matching: bool = False
    temp_init: float = 0.07
    contrast_bias_init: float | None = None

    def __post_init__(self) -> None:
        if self.joint_width < 1:
            raise ConfigError(f"joint_width={self.joint_width}: a size of at least 1 is needed")
        if self.temp_init <= 0:
            raise ConfigError(f"temp_init={self.temp_init}: must be positive")
        encoder, width = self.vision.encoder, self.text.context_width
        if not encoder.pool:
            raise ConfigError("vision.encoder.pool=False: stage 2 contrasts the pooled vector")
        if not self.project_tokens and width != encoder.width:
            raise ConfigError(
                f"text.context_width={width} must be vision.encoder.width={encoder.width}, as "
                "project_tokens=False gives the fusion layers the vision tokens as they are"
            )
        if self.audio is None:
            for field in ("av_fusion", "audio_matching", "av_matching"):
                if getattr(self, field):
                    raise ConfigError(f"{field}=True needs an audio encoder, but audio=None")
        elif not self.project_tokens:
            raise ConfigError("audio needs project_tokens=True: one width for all tokens")
        if self.av_matching and not self.av_fusion:
            raise ConfigError("av_matching=True needs av_fusion=True")

    @property
    def precision(self) -> Precision:
        """Dtypes of the projections and heads: the vision tower's."""
        return self.vision.encoder.precision


@flax.struct.dataclass
class MediaFeatures:
    """What a batch of videos or of sounds gives.

    Attributes:
        tokens: `(B, N, text.context_width)` what the fusion layers read.
        pooled: `(B, C)` the tower's pooled vector.
        joint: `(B, joint_width)` in the joint space, no unit length yet (the loss scales).
        aligned: `(K, B, N, C)` decoded towards the teacher's tokens, or None.
        aligned_final: `(B, C)` decoded towards the teacher's pooled vector, or None.
    """

    tokens: jax.Array
    pooled: jax.Array
    joint: jax.Array
    aligned: jax.Array | None = None
    aligned_final: jax.Array | None = None


@flax.struct.dataclass
class TextFeatures:
    """What a batch of texts gives.

    Attributes:
        hidden: `(B, L, D)` after the text layers, which the fusion layers start from.
        mask: `(B, L)`, 1 = token, 0 = padding, or None.
        joint: `(B, joint_width)` of the first token, no unit length yet.
    """

    hidden: jax.Array
    mask: jax.Array | None
    joint: jax.Array


@flax.struct.dataclass
class Stage2Output:
    """Features of a batch.

    Attributes:
        vision: of the videos.
        text: of the texts.
        audio: of the sounds, or None.
        audiovisual: `(B, joint_width)` joint vectors of sound and video, or None.
        match_logits: `(B, 2)` of each video with its text; class 1 = they belong together.
    """

    vision: MediaFeatures
    text: TextFeatures
    audio: MediaFeatures | None
    audiovisual: jax.Array | None
    match_logits: jax.Array


class TokenProjection(nn.Module):
    """Linear map and LayerNorm of a tower's tokens.

    Attributes:
        in_width: size of the tower's tokens.
        out_width: size of the tokens that the fusion layers read.
        precision: dtypes.
    """

    in_width: int
    out_width: int
    precision: Precision = Precision()

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps `(B, N, in_width)` to `(B, N, out_width)`."""
        # The output's axis stays unnamed: the input's takes the mesh axis that "embed" maps to.
        x = Linear(
            (self.in_width,),
            (self.out_width,),
            ("embed",),
            (None,),
            precision=self.precision,
            name="fc",
        )(tokens)
        return LayerNorm(self.out_width, axis_name=None, precision=self.precision, name="norm")(x)


HEADS = {"video": "itm_head", "audio": "atm_head", "audiovisual": "avtm_head"}


class Stage2(nn.Module):
    """Towers, projections into the joint space, and matching heads.

    Attributes:
        config: shape and options.
    """

    config: Stage2Config

    def setup(self) -> None:
        """Makes the towers and what the config names beside them."""
        c = self.config
        self.vision_encoder = Student(c.vision)
        self.text_encoder = Bert(c.text)
        self.vision_proj = self._linear(c.vision.encoder.pool_width, "pool", c.joint_width)
        self.text_proj = self._linear(c.text.width, "embed", c.joint_width)
        self.itm_head = self._linear(c.text.width, "embed", 2)
        if c.project_tokens:
            self.vision_tokens = TokenProjection(
                c.vision.encoder.width, c.text.context_width, c.precision
            )
        if c.audio is not None:
            self.audio_encoder = Beats(c.audio)
            self.audio_proj = self._linear(c.audio.width, "embed", c.joint_width)
            self.audio_tokens = TokenProjection(c.audio.width, c.text.context_width, c.precision)
        if c.av_fusion:
            self.fusion = self._linear(2 * c.joint_width, "target", c.joint_width)
        if c.audio_matching:
            self.atm_head = self._linear(c.text.width, "embed", 2)
        if c.av_matching:
            self.avtm_head = self._linear(c.text.width, "embed", 2)
        # Kept in float32: bfloat16 rounds 0.07 to 0.0698 (spec stage2 11.5).
        init = boxed(nn.initializers.constant(c.temp_init))
        self.temp = self.param("temp", init, (), jnp.float32)
        if c.contrast_bias_init is not None:
            init = boxed(nn.initializers.constant(c.contrast_bias_init))
            self.contrast_bias = self.param("contrast_bias", init, (), jnp.float32)

    def _linear(self, in_width: int, in_axis: str, out_width: int) -> Linear:
        """A map whose output's axis is too small to be split."""
        return Linear(
            (in_width,), (out_width,), (in_axis,), (None,), precision=self.config.precision
        )

    def __call__(
        self,
        video: jax.Array,
        ids: jax.Array,
        mask: jax.Array | None = None,
        fbank: jax.Array | None = None,
        *,
        visible: jax.Array | None = None,
        train: bool = False,
    ) -> Stage2Output:
        """Encodes a batch of videos with their texts and sounds, and judges the pairs.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels; T = 1 for images.
            ids: int `(B, L)` token ids.
            mask: `(B, L)`, 1 = token, 0 = padding; None for no padding.
            fbank: `(B, frames, mels)` normalised log-mel energies, or None.
            visible: int `(B, N)` video tokens that are seen; None for all.
            train: turns DropPath and dropout on (rng streams `droppath`, `dropout`).

        Returns:
            `Stage2Output`.
        """
        vision = self.encode_vision(video, visible, train=train)
        text = self.encode_text(ids, mask, train=train)
        audio = audiovisual = None
        if fbank is not None:
            audio = self.encode_audio(fbank, train=train)
            if self.config.av_fusion:
                audiovisual = self.fuse_joint(audio.joint, vision.joint)
        fused = self.fuse(vision.tokens, text.hidden, text.mask, train=train)
        if self.is_initializing():
            self._touch(fused)
        return Stage2Output(vision, text, audio, audiovisual, self.match_logits(fused))

    def _touch(self, fused: jax.Array) -> None:
        """Makes the parameters of the heads that a plain call does not use."""
        if self.config.text.mlm_head:
            self.word_logits(fused)
        for media in ("audio", "audiovisual"):
            if hasattr(self, HEADS[media]):
                self.match_logits(fused, media)

    def encode_vision(
        self, video: jax.Array, visible: jax.Array | None = None, *, train: bool = False
    ) -> MediaFeatures:
        """Encodes videos, or images as videos of one frame.

        Args:
            video: `(B, T, H, W, 3)` normalised pixels.
            visible: int `(B, N)` sorted token numbers, the class token (0) among them; None for
                all tokens.
            train: turns DropPath on (rng stream `droppath`).

        Returns:
            `MediaFeatures`, with what the alignment decoders make; a compiled program that does
            not use that does not compute it.
        """
        out = self.vision_encoder(video, visible, train=train)
        tokens = self.vision_tokens(out.tokens) if self.config.project_tokens else out.tokens
        return MediaFeatures(tokens, out.pooled, self.vision_proj(out.pooled), out.clip, out.final)

    def encode_segments(self, video: jax.Array, num_segments: int) -> MediaFeatures:
        """Encodes long clips in evaluation: the mean over interleaved sub-clips.

        Args:
            video: `(B, S * T, H, W, 3)`; sub-clip s has the frames s, s + S, s + 2 S, ...
            num_segments: S.

        Returns:
            `MediaFeatures` without alignments, tokens and pooled vectors averaged over sub-clips.

        Raises:
            ConfigError: the frames do not divide into sub-clips of `num_frames`.
        """
        batch, frames, *size = video.shape
        wanted = num_segments * self.config.vision.encoder.num_frames
        if frames != wanted:
            raise ConfigError(
                f"{num_segments} segments of num_frames={self.config.vision.encoder.num_frames} "
                f"need {wanted} frames, got {frames}"
            )
        video = video.reshape(batch, -1, num_segments, *size).swapaxes(1, 2)
        out = self.encode_vision(video.reshape(batch * num_segments, -1, *size))
        tokens, pooled = (
            jnp.mean(x.reshape(batch, num_segments, *x.shape[1:]), axis=1)
            for x in (out.tokens, out.pooled)
        )
        return MediaFeatures(tokens, pooled, self.vision_proj(pooled))

    def encode_audio(self, fbank: jax.Array, *, train: bool = False) -> MediaFeatures:
        """Encodes sounds.

        Args:
            fbank: `(B, frames, mels)` normalised log-mel energies (`data.fbank`).
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `MediaFeatures`; `pooled` is the mean of the encoder's tokens.

        Raises:
            ConfigError: the model has no audio encoder.
        """
        if self.config.audio is None:
            raise ConfigError("audio=None: this model has no audio encoder")
        out = self.audio_encoder(fbank, train=train)
        return MediaFeatures(self.audio_tokens(out.tokens), out.pooled, self.audio_proj(out.pooled))

    def encode_text(
        self, ids: jax.Array, mask: jax.Array | None = None, *, train: bool = False
    ) -> TextFeatures:
        """Encodes texts.

        Args:
            ids: int `(B, L)` token ids.
            mask: `(B, L)`, 1 = token, 0 = padding; None for no padding.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `TextFeatures`.
        """
        hidden = self.text_encoder.encode_text(ids, mask, train=train)
        return TextFeatures(hidden, mask, self.project_text(hidden[:, 0]))

    def project_text(self, first: jax.Array) -> jax.Array:
        """Joint vectors `(B, joint_width)` from the text layers' first token `(B, D)`."""
        return self.text_proj(first)

    def fuse_joint(self, audio: jax.Array, vision: jax.Array) -> jax.Array:
        """Joint vectors `(B, joint_width)` of sound and video together, from those of each.

        Raises:
            ConfigError: the model was made without `av_fusion`.
        """
        if not self.config.av_fusion:
            raise ConfigError("av_fusion=False: this model does not join audio and video vectors")
        return self.fusion(jnp.concatenate([audio, vision], axis=-1))

    def fuse(
        self,
        tokens: jax.Array | None,
        hidden: jax.Array,
        mask: jax.Array | None,
        *,
        versions: Versions | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Lets texts read media, for `match_logits` and `word_logits`.

        All that reads the same kind of media can go in one batch: true pairs, wrong pairs and
        corrupted texts.

        Args:
            tokens: `(B, N, text.context_width)` of the media; for audio with video the audio's
                tokens first (`join_tokens`); None for text alone.
            hidden: `(B, L, D)` from `encode_text`.
            mask: `(B, L)` of the text, or None.
            versions: several texts read one row of `tokens`.
            train: turns dropout on (rng stream `dropout`).

        Returns:
            `(B, L, D)`.
        """
        return self.text_encoder.fuse(hidden, mask, tokens, versions=versions, train=train)

    def match_logits(self, fused: jax.Array, media: str = "video") -> jax.Array:
        """Judges whether media and texts belong together.

        Args:
            fused: `(B, L, D)` from `fuse`.
            media: which head judges: 'video', 'audio' or 'audiovisual'.

        Returns:
            `(B, 2)` logits; class 1 = they belong together.

        Raises:
            ConfigError: the model has no such head.
        """
        head = getattr(self, HEADS[media], None) if media in HEADS else None
        if head is None:
            has = [name for name, attribute in HEADS.items() if hasattr(self, attribute)]
            raise ConfigError(f"media={media!r}: this model has heads for {', '.join(has)}")
        return head(fused[:, 0])

    def word_logits(self, fused: jax.Array) -> jax.Array:
        """Guesses the words of corrupted texts that have read their media.

        Args:
            fused: `(B, L, D)` from `fuse`, of texts corrupted by `objectives.masked_lm.corrupt`.

        Returns:
            `(B, L, vocab_size)` logits, float32.

        Raises:
            ConfigError: the text tower has no masked-LM head.
        """
        return self.text_encoder.mlm_logits(fused)


def join_tokens(audio: jax.Array, vision: jax.Array) -> jax.Array:
    """Audio and vision tokens in one sequence `(B, N + M, C)`, the audio's first (spec 6.6)."""
    return jnp.concatenate([audio, vision], axis=1)


def _vision(name: str, image_positions: str) -> StudentConfig:
    """A stage-1 student as stage 2 has it: four frames, images, no video teacher (spec 2)."""
    student = zoo.get(name)
    encoder = dataclasses.replace(student.encoder, num_frames=4, image_positions=image_positions)
    return dataclasses.replace(student, encoder=encoder, mae=None)


def _audiovisual(vision: StudentConfig, text: str, audio: str, joint_width: int) -> Stage2Config:
    """The audiovisual layout with the heads of the 6B's losses (spec 6.6)."""
    return Stage2Config(
        vision=vision,
        text=BERT_ZOO[text],
        audio=BEATS_ZOO[audio],
        joint_width=joint_width,
        project_tokens=True,
        av_fusion=True,
        av_matching=True,
    )


_VISUAL_1B = Stage2Config(
    vision=_vision("internvideo2_1b_pretrain", "own"), text=BERT_ZOO["bert_large_stage2_1b"]
)
_VISION_TEST = _vision("test_tiny_pretrain", "own")

ZOO: dict[str, Stage2Config] = {
    "internvideo2_stage2_1b": _VISUAL_1B,
    # Evaluation's layout of the same model: no masked-LM head, text keys without `bert.`.
    "internvideo2_stage2_1b_retrieval": dataclasses.replace(
        _VISUAL_1B, text=dataclasses.replace(_VISUAL_1B.text, mlm_head=False)
    ),
    "internvideo2_stage2_6b": _audiovisual(
        _vision("internvideo2_6b_pretrain", "shared"),
        "bert_large_stage2_6b",
        "beats_iter3",
        768,
    ),
    # The audiovisual layout on the 1B encoder; nobody released one.
    "internvideo2_stage2_1b_audiovisual": _audiovisual(
        _vision("internvideo2_1b_pretrain", "own"), "bert_large_stage2_6b", "beats_iter3", 768
    ),
    "test_tiny_stage2": Stage2Config(
        vision=_VISION_TEST,
        text=dataclasses.replace(
            BERT_ZOO["test_tiny_bert"], context_width=_VISION_TEST.encoder.width
        ),
        joint_width=20,
    ),
    "test_tiny_stage2_audiovisual": dataclasses.replace(
        _audiovisual(
            _vision("test_tiny_pretrain", "shared"), "test_tiny_bert", "test_tiny_beats", 20
        ),
        audio_matching=True,
    ),
}
