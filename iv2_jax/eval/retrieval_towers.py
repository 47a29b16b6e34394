"""Both towers over a whole set, in batches of one shape, on any mesh.

Compiled functions are kept by (model config, kind of media, mesh), so an evaluation in the training
loop compiles at its first call alone. Nothing crosses between host and devices unasked: all
transfers are explicit and pass `jax.transfer_guard("disallow")`.

What the second pass needs stays in host memory, in the model's own dtype: the tokens of each
clip on the process that decoded it, the text layers' states everywhere. For 1000 videos of the 1B
model at four frames (1025 tokens of 1408) that is 2.9 GB in bfloat16; the devices hold one batch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from iv2_jax.errors import ConfigError
from iv2_jax.models import kinds
from iv2_jax.models.clip import ClipConfig, SmallClipConfig
from iv2_jax.models.stage2 import Stage2, Stage2Config, join_tokens
from iv2_jax.models.text.bert_layers import Versions
from iv2_jax.parallel import rules
from iv2_jax.parallel.distributed import put
from iv2_jax.parallel.mesh import (
    BATCH_AXES,
    MeshConfig,
    batch_sharding,
    make_mesh,
    replicated,
)

ModelConfig = Stage2Config | ClipConfig | SmallClipConfig

# Kind of media -> name of the matching head that judges it.
HEAD_OF_MEDIA = {
    "video": "video",
    "image": "video",
    "audio": "audio",
    "audio_video": "audiovisual",
}
_INPUTS = {
    "video": ("video",),
    "image": ("video",),
    "audio": ("fbank",),
    "audio_video": ("video", "fbank"),
}


@dataclass
class EncodedMedia:
    """The clips that could be used.

    Attributes:
      index: (V,) position of each in the split's list, ascending.
      joint: (V, D) float32 in the joint space.
      tokens: By position in the list: (N, C), what the fusion layers read; only this process's
        clips, and none unless asked for.
      owner: (V,) process that has each clip's tokens.
      undecodable: Positions of clips that do not decode.
      silent: Positions of clips without usable sound, where sound was asked for.
    """

    index: np.ndarray
    joint: np.ndarray
    tokens: dict[int, np.ndarray] = field(default_factory=dict)
    owner: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    undecodable: list[int] = field(default_factory=list)
    silent: list[int] = field(default_factory=list)


@dataclass
class EncodedTexts:
    """Texts of one set.

    Attributes:
      joint: (T, D) float32 in the joint space.
      hidden: (T, L, D) after the text layers, or None unless asked for.
      mask: (T, L), 1 = token, 0 = padding.
    """

    joint: np.ndarray
    hidden: np.ndarray | None
    mask: np.ndarray


def check_media(config: ModelConfig, media: str, *, rerank: bool) -> None:
    """Refuses media that a model has no tower or head for.

    Raises:
      ConfigError: Names the field of the model's config that is missing.
    """
    if media not in _INPUTS:
        raise ConfigError(f"data.media {media!r}: retrieval takes {', '.join(_INPUTS)}")
    if not isinstance(config, Stage2Config):
        if media not in ("video", "image"):
            raise ConfigError(f"data.media {media!r}: CLIP models have no tower for sound")
        if rerank:
            raise ConfigError("rerank needs fusion layers and a matching head; CLIP has none")
        return
    if "audio" in media and config.audio is None:
        raise ConfigError(
            f"data.media {media!r} needs a model with an audio encoder, not audio=None"
        )
    if media == "audio_video" and not config.av_fusion:
        raise ConfigError("data.media 'audio_video' needs a model with av_fusion=True")
    if not rerank:
        return
    field_of_head = {"audio": "audio_matching", "audio_video": "av_matching"}.get(media)
    if field_of_head and not getattr(config, field_of_head):
        raise ConfigError(
            f"rerank of media {media!r} needs a model with {field_of_head}=True; without it "
            "take rerank_top=0"
        )
    if not config.text.num_fusion_layers:
        raise ConfigError("rerank needs fusion layers, but text.fusion_layer equals text.depth")


class Towers:
    """A model's parameters on a mesh, with what evaluation asks of them.

    Attributes:
      config: Of the model.
      mesh: Where it runs.
    """

    def __init__(self, params: Any, config: ModelConfig, mesh: Mesh | None = None) -> None:
        """Puts parameters that are still on the host onto the mesh.

        Args:
          params: Host arrays, or arrays on the devices of `mesh`.
          config: Of the model they belong to.
          mesh: None takes the parameters' own, or one device for host arrays.
        """
        if not isinstance(config, Stage2Config | ClipConfig | SmallClipConfig):
            raise ConfigError(
                f"retrieval needs a stage-2 or CLIP model, not {type(config).__name__}"
            )
        self.config = config
        self.mesh = mesh if mesh is not None else _mesh_of(params)
        self._params = _place(params, config, self.mesh)

    def round_up(self, batch_size: int) -> int:
        """The next batch size that the mesh can split."""
        shards = int(np.prod([self.mesh.shape[axis] for axis in BATCH_AXES]))
        shards = int(np.lcm(shards, jax.process_count()))
        return -(-max(batch_size, 1) // shards) * shards

    def temperature(self) -> float:
        """What the model's similarities are divided by."""
        return float(jax.device_get(self._params["temp"]))

    def encode_media(
        self,
        batches: Iterable[Mapping[str, np.ndarray]],
        media: str,
        *,
        segments: int = 1,
        keep_tokens: bool = False,
    ) -> EncodedMedia:
        """Encodes every clip of an evaluation pass.

        Args:
          batches: This process's rows, `index` -1 and `valid` False in padding.
          media: What is read of them, a key of `HEAD_OF_MEDIA`.
          segments: Interleaved sub-clips that a stage-2 model averages over.
          keep_tokens: Keep what the fusion layers read.
        """
        step = _media_step(self.config, media, segments, keep_tokens, self.mesh)
        whole = batch_sharding(self.mesh)
        out = EncodedMedia(np.zeros(0, int), np.zeros((0, 0), np.float32))
        index, joint, owner = [], [], []
        for batch in batches:
            rows = len(batch["index"])
            about = {
                "index": np.asarray(batch["index"], np.int32),
                "valid": np.asarray(batch.get("valid", np.ones(rows, bool))),
                "sound": np.asarray(batch.get("has_audio", np.ones(rows, bool))),
                "owner": np.full(rows, jax.process_index(), np.int32),
            }
            arrays = {name: np.asarray(batch[name]) for name in _INPUTS[media]} | about
            arrays = {
                name: jax.make_array_from_process_local_data(whole, array)
                for name, array in arrays.items()
            }
            result = step(self._params, arrays)
            tokens = result.pop("tokens", None)
            result = jax.device_get(result)
            real = result["index"] >= 0
            usable = real & result["valid"]
            out.undecodable += result["index"][real & ~result["valid"]].tolist()
            if "fbank" in _INPUTS[media]:
                out.silent += result["index"][usable & ~result["sound"]].tolist()
                usable &= result["sound"]
            index.append(result["index"][usable])
            joint.append(result["joint"][usable])
            owner.append(result["owner"][usable])
            if tokens is not None:
                # A copy: a row must not keep its whole batch alive, nor the padding.
                out.tokens |= {
                    int(i): np.array(row)
                    for i, row in zip(about["index"], _local_rows(tokens), strict=True)
                    if usable[result["index"] == i].any()
                }
        if index:
            order = np.argsort(np.concatenate(index), kind="stable")
            out.index, out.joint, out.owner = (
                np.concatenate(parts)[order] for parts in (index, joint, owner)
            )
        return out

    def encode_texts(
        self, ids: np.ndarray, mask: np.ndarray, *, batch_size: int, keep_hidden: bool = False
    ) -> EncodedTexts:
        """Encodes tokenised texts, the same on every process.

        Args:
          ids: int (T, L).
          mask: (T, L), 1 = token, 0 = padding.
          batch_size: Texts a step; rounded up to what the mesh splits.
          keep_hidden: Keep the text layers' states.
        """
        step = _text_step(self.config, keep_hidden, self.mesh)
        size = self.round_up(min(batch_size, len(ids)))
        joint, hidden = [], []
        for start in range(0, len(ids), size):
            part = {"ids": ids[start : start + size], "mask": mask[start : start + size]}
            result = jax.device_get(step(self._params, self._put(part, size)))
            keep = len(part["ids"])
            joint.append(result["joint"][:keep])
            if keep_hidden:
                hidden.append(result["hidden"][:keep])
        return EncodedTexts(
            np.concatenate(joint), np.concatenate(hidden) if hidden else None, np.asarray(mask)
        )

    def match(
        self, tokens: np.ndarray, hidden: np.ndarray, mask: np.ndarray, media: str
    ) -> np.ndarray:
        """Judges each clip of a batch with several texts.

        Args:
          tokens: (G / P, N, C) this process's rows of the clips.
          hidden: (G / P, Q, L, D) of Q texts for each.
          mask: (G / P, Q, L) of the texts.
          media: A key of `HEAD_OF_MEDIA`.

        Returns:
          (G, Q) logits of "belong together", float32, of all processes' rows.
        """
        step = _match_step(self.config, HEAD_OF_MEDIA[media], self.mesh)
        whole = batch_sharding(self.mesh)
        arrays = [
            jax.make_array_from_process_local_data(whole, np.ascontiguousarray(x))
            for x in (tokens, hidden, mask)
        ]
        return jax.device_get(step(self._params, *arrays))

    def _put(self, arrays: Mapping[str, np.ndarray], size: int) -> dict[str, jax.Array]:
        """Global arrays of `size` rows from host arrays that every process has, padded."""
        whole, count = batch_sharding(self.mesh), jax.process_count()
        local = slice(
            jax.process_index() * (size // count), (jax.process_index() + 1) * (size // count)
        )
        out = {}
        for name, array in arrays.items():
            # The first row again: padding of zeros would be a text of no token, NaN in some models.
            filled = np.concatenate([array, np.repeat(array[:1], size - len(array), axis=0)])
            out[name] = jax.make_array_from_process_local_data(whole, filled[local])
        return out


def _mesh_of(params: Any) -> Mesh:
    """The mesh that parameters lie on; one device for host arrays."""
    for leaf in jax.tree.leaves(params):
        sharding = getattr(leaf, "sharding", None)
        if isinstance(sharding, NamedSharding):
            return sharding.mesh
        if sharding is not None:
            return make_mesh(MeshConfig(max_devices=1), sorted(leaf.devices(), key=lambda d: d.id))
    return make_mesh(MeshConfig(max_devices=1))


def _place(params: Any, config: ModelConfig, mesh: Mesh) -> Any:
    """Host arrays sharded over the mesh by the package's table; device arrays as they are."""
    leaves = jax.tree.leaves(params)
    if all(
        isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding) for leaf in leaves
    ):
        return params
    tree, _ = rules.shardings(kinds.of(config).boxed_params(config), mesh)
    return jax.tree.map(put, params, tree)


def _local_rows(array: jax.Array) -> np.ndarray:
    """The rows of a global batch that this process put in."""
    if array.is_fully_addressable:
        return jax.device_get(array)
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([jax.device_get(parts[start]) for start in sorted(parts)])


def _encode_media(
    model: Any, batch: Mapping[str, jax.Array], media: str, segments: int
) -> tuple[jax.Array, jax.Array | None]:
    """Joint vectors and tokens of a batch; runs inside the model's `apply`."""
    if not isinstance(model, Stage2):
        video = model.config.vision.normalize(batch["video"])
        return model.encode_vision(video), None
    vision = audio = None
    if "video" in batch:
        video = model.config.vision.encoder.normalize(batch["video"])
        vision = (
            model.encode_vision(video) if segments == 1 else model.encode_segments(video, segments)
        )
    if "fbank" in batch:
        audio = model.encode_audio(batch["fbank"])
    if vision is None:
        return audio.joint, audio.tokens
    if audio is None:
        return vision.joint, vision.tokens
    joint = model.fuse_joint(audio.joint, vision.joint)
    return joint, join_tokens(audio.tokens, vision.tokens)


def _compiled(config: ModelConfig, mesh: Mesh, method: Any, out_shardings: Any) -> Any:
    """`jit` of a method of a model that sees the mesh its attention kernels are split over."""
    model = kinds.of(config).build(config)

    def run(params: Any, *args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return model.apply({"params": params}, *args, method=method)

    return jax.jit(run, out_shardings=out_shardings)


@functools.lru_cache(maxsize=16)
def _media_step(
    config: ModelConfig, media: str, segments: int, keep_tokens: bool, mesh: Mesh
) -> Any:
    """(params, batch) -> joint vectors and what belongs to them, whole on every device."""

    def method(model: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        joint, tokens = _encode_media(model, batch, media, segments)
        about = {name: batch[name] for name in ("index", "valid", "sound", "owner")}
        out = about | {"joint": joint.astype(jnp.float32)}
        return out | {"tokens": tokens} if keep_tokens else out

    shardings = dict.fromkeys(("index", "valid", "sound", "owner", "joint"), replicated(mesh))
    if keep_tokens:
        shardings["tokens"] = batch_sharding(mesh)
    return _compiled(config, mesh, method, shardings)


@functools.lru_cache(maxsize=16)
def _text_step(config: ModelConfig, keep_hidden: bool, mesh: Mesh) -> Any:
    """(params, ids and mask) -> joint vectors and hidden states, whole on every device."""

    def method(model: Any, batch: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        if not isinstance(model, Stage2):
            return {"joint": model.encode_text(batch["ids"]).pooled.astype(jnp.float32)}
        text = model.encode_text(batch["ids"], batch["mask"])
        out = {"joint": text.joint.astype(jnp.float32)}
        return out | {"hidden": text.hidden} if keep_hidden else out

    return _compiled(config, mesh, method, replicated(mesh))


@functools.lru_cache(maxsize=16)
def _match_step(config: ModelConfig, head: str, mesh: Mesh) -> Any:
    """(params, tokens, hidden, mask) -> logits (G, Q), see `Towers.match`."""

    model = kinds.of(config).build(config)

    def run(params: Any, tokens: jax.Array, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        rows, texts = mask.shape[:2]

        def method(model: Stage2) -> jax.Array:
            beside = (x.reshape(rows * texts, *x.shape[2:]) for x in (hidden, mask))
            # Keys and values of a clip's tokens, most of the work, are made once for its texts.
            fused = model.fuse(tokens, *beside, versions=Versions(texts))
            return model.match_logits(fused, head)[:, 1].reshape(rows, texts)

        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return model.apply({"params": params}, method=method).astype(jnp.float32)

    return jax.jit(run, out_shardings=replicated(mesh))
