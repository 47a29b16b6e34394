"""What turns raw data into a model's input: the contents of an exported preprocessing.json."""

from __future__ import annotations

from typing import Any


def video(config: Any) -> dict[str, Any]:
    """Of a model that sees clips.

    Args:
        config: has `num_frames`, `image_size` and, where they are not ImageNet's, `pixel_mean` and
            `pixel_std`.
    """
    from iv2_jax.pixels import IMAGENET_MEAN, IMAGENET_STD

    return {
        "color": "RGB",
        "num_frames": config.num_frames,
        "sampling": (
            "T = num_frames of a clip of n frames, one from the middle of each segment: "
            "frame i is round(i * (n - 1) / T) + int((n - 1) / T / 2), i = 0 .. T - 1"
        ),
        "image_size": config.image_size,
        "resize": "shorter side to image_size, bilinear; then the centre square",
        "scale": 255,
        "mean": list(getattr(config, "pixel_mean", IMAGENET_MEAN)),
        "std": list(getattr(config, "pixel_std", IMAGENET_STD)),
        "layout": "B 3 T H W",
    }


def student(config: Any) -> dict[str, Any]:
    """Of a model whose config has the video encoder's under `encoder`."""
    return video(config.encoder)


def classifier(config: Any) -> dict[str, Any]:
    """Of a model whose config has the video encoder's under `encoder`, and classes."""
    return video(config.encoder) | {"num_classes": config.num_classes}


def text(config: Any) -> dict[str, Any]:
    """Of a CLIP text tower."""
    is_llama = hasattr(config, "decoder")
    return {
        "input_ids": "B L, padded with 0 on the right",
        "tokenizer": "LLaMA SentencePiece" if is_llama else "CLIP byte-pair encoding",
        "vocab_size": config.vocab_size,
        **({} if is_llama else {"max_length": config.context_length}),
    }


def bert(config: Any) -> dict[str, Any]:
    """Of BERT: the original leaves the last [SEP] out."""
    return {
        "input_ids": "B L, [CLS] first and no [SEP] last, padded on the right",
        "attention_mask": "B L, 1 at tokens and 0 at padding",
        "tokenizer": "BERT WordPiece, lower case",
        "vocab_size": config.vocab_size,
        "max_length": config.max_length,
    }


def audio(config: Any) -> dict[str, Any]:
    """Of the audio encoder."""
    from iv2_jax.data import fbank

    return {
        "sample_rate": fbank.SAMPLE_RATE,
        "frame_length": fbank.FRAME_LENGTH,
        "frame_shift": fbank.FRAME_SHIFT,
        "num_mels": fbank.NUM_MELS,
        "mean": fbank.MEAN,
        "scale": fbank.SCALE,
        "layout": "B frames mels",
    }


def stage2(config: Any) -> dict[str, Any]:
    """Of a stage-2 model."""
    spec = {"video": video(config.vision.encoder), "text": bert(config.text)}
    return spec if config.audio is None else spec | {"audio": audio(config.audio)}


def clip(config: Any) -> dict[str, Any]:
    """Of a CLIP model."""
    return {"video": video(config.vision), "text": text(config.text)}


def llm(config: Any) -> dict[str, Any]:
    """Of a language model."""
    return {
        "input_ids": "B L, the tokenizer that belongs to the base model",
        "vocab_size": config.vocab_size,
    }


def bridge(config: Any) -> dict[str, Any]:
    """Of the bridge, which reads another model's tokens."""
    spec = {"features": f"B N {config.context_width}, tokens of the video encoder's last block"}
    if not config.text:
        return spec
    return spec | {
        "text": {
            "input_ids": "B L, of the instruction",
            "tokenizer": "BERT WordPiece, lower case",
            "vocab_size": config.vocab_size,
            "max_length": config.max_length,
        }
    }


def chat(config: Any) -> dict[str, Any]:
    """Of a dialogue model."""
    spec = {"bridge": bridge(config.bridge), "llm": llm(config.llm)}
    return spec if config.encoder is None else {"video": video(config.encoder)} | spec


def bridge_pretraining(config: Any) -> dict[str, Any]:
    """Of a Q-Former's pretraining."""
    return {"video": video(config.encoder), "bridge": bridge(config.bridge)}


def shots(config: Any) -> dict[str, Any]:
    """Of a shot-boundary detector."""
    return {
        "color": "RGB",
        "frames": "every frame of the video, in windows of 100 with 25 of context on both sides",
        "height": config.frame_height,
        "width": config.frame_width,
        "scale": 1,
        "layout": "B T H W 3, 0..255",
    }
