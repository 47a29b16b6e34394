"""What each kind of model needs to cross between our trees and PyTorch, resolved on demand.

`models.kinds` knows how a kind is built; a family adds its table of keys, the keys of released
files that carry nothing, our PyTorch modules and what preprocessing goes with the weights.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from iv2_jax.errors import ConfigError, nearest
from iv2_jax.interop.entries import Entry
from iv2_jax.models import kinds

_KEYS = "iv2_jax.interop.torch_keys"


@dataclasses.dataclass(frozen=True)
class Family:
    """How one kind of model goes to PyTorch and back.

    Attributes:
        name: the kind's name in `models.kinds`.
        keys: `module:function` that gives the entries of a config.
        ignore: `module:NAME` of `{regular expression of whole keys: reason}` for tensors of
            released files that are knowingly left out, or None.
        variants: `module:function` that brings a file's other names for the same tensors to those
            of the table, or None.
        torch_file: file of `interop/torch_models` with the PyTorch modules and `from_config`.
        preprocessing: `module:function` that gives what turns raw data into the model's input.
        loads: which released or trained files it reads, for people.
    """

    name: str
    keys: str
    ignore: str | None
    variants: str | None
    torch_file: str | None
    preprocessing: str
    loads: str

    @property
    def kind(self) -> kinds.Kind:
        """The kind: config class, Flax module, inputs."""
        return kinds.get(self.name)

    def entries(self, config: Any) -> list[Entry]:
        """The table of keys of a config."""
        return kinds.resolve(self.keys)(config)

    def ignorable(self) -> Mapping[str, str]:
        """Patterns of keys that may be left out, each with its reason."""
        return {} if self.ignore is None else kinds.resolve(self.ignore)

    def to_read(
        self, config: Any, tensors: Mapping[str, Any]
    ) -> tuple[Mapping[str, Any], list[Entry]]:
        """A file's tensors and the entries that fit the names it uses.

        Args:
            config: the model's config.
            tensors: `{torch key: array}`, maybe lazily read.
        """
        if self.variants is None:
            return tensors, self.entries(config)
        return kinds.resolve(self.variants)(config, tensors)

    def preprocessing_spec(self, config: Any) -> dict[str, Any]:
        """What turns raw data into the model's input, for preprocessing.json."""
        return kinds.resolve(self.preprocessing)(config)


def get(name: str) -> Family:
    """The family of a name.

    Raises:
        ConfigError: there is none; names the nearest.
    """
    if name not in FAMILIES:
        raise ConfigError(f"no family of models is named {name!r}{nearest(name, FAMILIES)}")
    return FAMILIES[name]


def of(config: Any) -> Family:
    """The family of a config, by its class.

    Raises:
        ConfigError: it is no config of a model.
    """
    return get(kinds.of(config).name)


_V = "iv2_jax.interop.variants"
_P = "iv2_jax.interop.preprocessing"

_LOADS = {
    "encoder": "files of stage 1, distillation and fine-tuning; heads are left out",
    "student": "files of stage 1 and distillation",
    "videomae": "vit_g_hybrid_1200e_pre.pth with --prefix encoder.",
    "classifier": "fine-tuned and probed files of the same number of frames and classes",
    "bert": "the text tower of stage 2 with --prefix text_encoder.",
    "beats": "audio_6b.pth, or the audio tower of stage 2 with --prefix audio_encoder.",
    "stage2": "InternVideo2-stage2_1b-224p-f4.pt, InternVideo2-Stage2_6B and their likes",
    "mobileclip": "the text tower of CLIP S, B, L with --prefix text_encoder.",
    "llama_clip": "the text tower of CLIP 1B, 6B with --prefix text_encoder.",
    "clip": "whole files; 1B_clip.pth and 6B_clip.pth hold a part and need a recipe",
    "clip_small": "InternVideo2_CLIP_S, _B, _L",
    "llm": "files and sharded folders of transformers, adapters of old and new peft, GGUF files",
    "bridge": "the Q-Former and projections of a chat model",
    "bridge_pretraining": "runs of ours, to start chat models from",
    "chat": "InternVideo2-Chat-8B's folder, VideoChat2's files",
    "shots": "released weights in PyTorch",
}

FAMILIES: dict[str, Family] = {
    name: Family(
        name,
        f"{_KEYS}.{keys}",
        ignore and f"{_KEYS}.{ignore}",
        variants and f"{_V}:{variants}",
        torch_file,
        f"{_P}:{preprocessing}",
        _LOADS[name],
    )
    for name, keys, ignore, variants, torch_file, preprocessing in (
        ("encoder", "video:encoder_map", "video:HEADS", None, "video.py", "video"),
        ("student", "video:student_map", None, None, "video.py", "student"),
        # A teacher only: read, never exported.
        ("videomae", "video:videomae_map", None, None, None, "video"),
        (
            "classifier",
            "classifier:classifier_map",
            "classifier:IGNORABLE",
            None,
            "classifier.py",
            "classifier",
        ),
        ("bert", "text:bert_map", "text:IGNORABLE", None, "text.py", "bert"),
        ("beats", "audio:beats_map", "audio:IGNORABLE", "beats", "audio.py", "audio"),
        ("stage2", "stage2:stage2_map", "stage2:IGNORABLE", "stage2", "stage2.py", "stage2"),
        ("mobileclip", "clip:mobileclip_map", "clip:IGNORABLE", None, "clip.py", "text"),
        ("llama_clip", "clip:llama_clip_map", "clip:IGNORABLE", "peft", "clip.py", "text"),
        ("clip", "clip:clip_map", "clip:IGNORABLE", "peft", "clip.py", "clip"),
        ("clip_small", "clip:clip_map", "clip:IGNORABLE", None, "clip.py", "clip"),
        ("llm", "llm:llm_map", "llm:IGNORABLE", "peft", "llm.py", "llm"),
        ("bridge", "chat:bridge_map", "chat:BESIDE_BRIDGE", None, "bridge.py", "bridge"),
        # Only what goes on in training: read, never exported.
        (
            "bridge_pretraining",
            "chat:bridge_pretraining_map",
            None,
            None,
            None,
            "bridge_pretraining",
        ),
        ("chat", "chat:chat_map", "chat:IGNORABLE", "chat", "chat.py", "chat"),
        ("shots", "shots:shots_map", "shots:IGNORABLE", None, "shots.py", "shots"),
    )
}
