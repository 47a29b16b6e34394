"""AdamW by regex: schedule, decay groups, learning-rate multipliers and freezing.

Each of `decay`, `lr_multipliers` and `freeze` is a list of patterns over parameter paths
(`encoder/blocks/attn/qkv/kernel`), first match wins. A pattern that matches nothing is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from iv2_jax.errors import ConfigError
from iv2_jax.parallel.rules import path_name

# Spec stage1 6.1: no decay for 1-D parameters (norms, biases, layer scale) and for the class token
# and position tables. Blocks are stacked here, so "1-D" cannot be read off the shape.
NO_DECAY = (
    (r".*/(bias|scale|gamma)", 0.0),
    (r"(.*/)?(cls_token|(clip_|mae_)?(img_)?pos_embed(_spatial|_temporal|_cls)?)", 0.0),
    (r"temp|contrast_bias", 0.0),
    (r"(.*/)?down_norm/(mean|var|count)", 0.0),  # running statistics: nothing may pull at them
)

# A multiplier is one number, or one for each slice of an array's leading axis (stacked blocks).
Multiplier = float | tuple[float, ...]


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with linear warm-up and cosine decay (spec stage1 6.1).

    Attributes:
      lr: Peak learning rate, per 256 clips of global batch if `scale_lr_by_batch`.
      min_lr: Learning rate at the end, scaled alike.
      warmup_lr: Learning rate of step 0, scaled alike. The original's stage 1 starts at 0.
      schedule: `cosine` ends at `min_lr` (stage 1); `floored` is stages 2's and 3's: warm-up from 0
        and cosine to 0, never below `min_lr` (spec stage2 8.2).
      warmup_steps: Steps from `warmup_lr` to `lr`, both ends included.
      scale_lr_by_batch: Multiply the three rates by batch_size / 256.
      b1: First-moment decay.
      b2: Second-moment decay.
      eps: Added to the root of the second moment.
      weight_decay: Decoupled decay, times the learning rate.
      clip_norm: Global gradient norm above which gradients are scaled down; 0 turns it off.
      decay: (pattern, multiplier) over parameter paths; unmatched paths get 1.
      lr_multipliers: (pattern, multiplier) over parameter paths; unmatched paths get 1. A tuple
        of numbers multiplies the slices of the leading axis, block by block in a stack (see
        `layer_decay`).
      freeze: Patterns of parameters that get no update and no optimizer state.
      open: Patterns of parameters that are trained although `freeze` matches them: open parts of
        frozen towers.
      mu_dtype: What the first moment is kept in: the dtype of its parameter, or bfloat16 (2 bytes
        a parameter instead of 4).
      nu_dtype: The same of the second moment. It is rounded at random, up or down so that the mean
        is kept: rounded to the nearest it would no longer follow small changes of the gradients.
      ema_decay: Keep an exponential moving average of the parameters with this decay; 0 = none.
    """

    lr: float = 1.5e-4
    min_lr: float = 1e-5
    warmup_lr: float = 0.0
    warmup_steps: int = 0
    schedule: Literal["cosine", "floored"] = "cosine"
    scale_lr_by_batch: bool = True
    b1: float = 0.9
    b2: float = 0.98
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip_norm: float = 3.0
    decay: tuple[tuple[str, float], ...] = NO_DECAY
    lr_multipliers: tuple[tuple[str, Multiplier], ...] = ()
    freeze: tuple[str, ...] = ()
    open: tuple[str, ...] = ()
    mu_dtype: Literal["parameter", "bfloat16"] = "parameter"
    nu_dtype: Literal["parameter", "bfloat16"] = "parameter"
    ema_decay: float = 0.0

    def __post_init__(self) -> None:
        for name in ("lr", "min_lr", "warmup_lr", "warmup_steps", "weight_decay", "clip_norm"):
            if getattr(self, name) < 0:
                raise ConfigError(f"optimizer.{name} must be >= 0, not {getattr(self, name)}")
        for name in ("b1", "b2", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"optimizer.{name} must be in [0, 1), not {getattr(self, name)}")


def cosine_schedule(
    peak: float, final: float, total_steps: int, warmup_steps: int, start: float = 0.0
) -> Callable[[jax.Array | int], jax.Array]:
    """The original's schedule (spec stage1 6.1): linear warm-up, ends included, then cosine.

    The peak is reached by the last warm-up step and again by the first cosine step (trap 14).

    Args:
      peak: Learning rate after warm-up.
      final: Limit of the cosine at `total_steps`.
      total_steps: Steps of the run.
      warmup_steps: Steps of the linear part.
      start: Learning rate of step 0 when there is a warm-up.

    Returns:
      step -> float32 learning rate.
    """
    decay_steps = max(total_steps - warmup_steps, 1)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = start + (peak - start) * step / max(warmup_steps - 1, 1)
        progress = jnp.clip((step - warmup_steps) / decay_steps, 0.0, 1.0)
        cosine = final + 0.5 * (peak - final) * (1 + jnp.cos(jnp.pi * progress))
        return jnp.where(step < warmup_steps, warm, cosine)

    return schedule


def floored_schedule(
    peak: float, floor: float, total_steps: int, warmup_steps: int
) -> Callable[[jax.Array | int], jax.Array]:
    """Stage 2's schedule (spec stage2 8.2): linear from 0, cosine to 0, and a floor under both.

    Args:
      peak: Learning rate of step `warmup_steps`.
      floor: Least learning rate; the original's is a hundredth of the peak, so step 0 has that.
      total_steps: Steps of the run.
      warmup_steps: Steps of the linear part.

    Returns:
      step -> float32 learning rate.
    """
    decay_steps = max(total_steps - warmup_steps, 1)

    def schedule(step: jax.Array | int) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        warm = step / max(warmup_steps, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (step - warmup_steps) / decay_steps))
        return jnp.maximum(peak * jnp.where(step < warmup_steps, warm, cosine), floor)

    return schedule


def learning_rate(
    config: OptimizerConfig, total_steps: int, batch_size: int
) -> Callable[[jax.Array | int], jax.Array]:
    """The schedule of a run: `config`'s rates scaled to its batch."""
    if config.warmup_steps > total_steps:
        raise ConfigError(
            f"optimizer.warmup_steps {config.warmup_steps} exceeds the run's {total_steps} steps"
        )
    scale = batch_size / 256 if config.scale_lr_by_batch else 1.0
    if config.schedule == "floored":
        rates = config.lr * scale, config.min_lr * scale
        return floored_schedule(*rates, total_steps, config.warmup_steps)
    return cosine_schedule(
        config.lr * scale,
        config.min_lr * scale,
        total_steps,
        config.warmup_steps,
        config.warmup_lr * scale,
    )


def layer_decay(
    decay: float, depth: int, *, encoder: str = "encoder/"
) -> tuple[tuple[str, Multiplier], ...]:
    """Rules for `lr_multipliers`: the deeper under the head, the slower (spec stage1 6.1).

    Block i gets decay^(depth - i); the patch embedding, the class token and the joint position
    table get decay^(depth + 1); all else keeps 1, separable position tables among it, as in the
    original.

    Args:
      decay: Factor from one block to the one under it; 1 changes nothing.
      depth: Blocks of the encoder.
      encoder: Path prefix of the encoder in the parameter tree.
    """
    prefix = re.escape(encoder)
    blocks = tuple(decay ** (depth - i) for i in range(depth))
    return (
        (rf"{prefix}(patch_embed/.*|cls_token|pos_embed)", decay ** (depth + 1)),
        (rf"{prefix}blocks/.*", blocks),
    )


def match(params: Any, rules: tuple[tuple[str, Any], ...], default: Any, what: str) -> Any:
    """A tree of the value of the first rule whose pattern matches the whole path.

    Raises:
      ConfigError: A pattern that matches no parameter; names it and shows a few paths.
    """
    compiled = [(re.compile(pattern), value) for pattern, value in rules]
    used = [False] * len(compiled)

    def one(path: tuple[Any, ...], _: Any) -> float:
        name = path_name(path)
        for i, (pattern, value) in enumerate(compiled):
            if pattern.fullmatch(name):
                used[i] = True
                return value
        return default

    values = jax.tree_util.tree_map_with_path(one, params)
    for (pattern, _), hit in zip(rules, used, strict=True):
        if not hit:
            paths = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)][:5]
            raise ConfigError(
                f"{what}: pattern {pattern!r} matches no parameter; paths look like {paths}"
            )
    return values


def trainable(config: OptimizerConfig, params: Any) -> Any:
    """A tree of bools: False where `config.freeze` matches and `config.open` does not."""
    rules = tuple((pattern, 1.0) for pattern in config.open)
    rules += tuple((pattern, 0.0) for pattern in config.freeze)
    values = match(params, rules, 1.0, "optimizer.open and optimizer.freeze")
    return jax.tree.map(bool, values)


def trained_paths(config: OptimizerConfig, params: Any) -> list[str]:
    """Paths of the parameters that are trained.

    Raises:
      ConfigError: A pattern of `freeze` or `open` matches nothing.
    """
    trained = trainable(config, params)
    return [path_name(p) for p, on in jax.tree_util.tree_leaves_with_path(trained) if on]


def make_optimizer(
    config: OptimizerConfig, schedule: Callable[[Any], Any], params: Any
) -> optax.GradientTransformation:
    """The optimizer of a run for parameters (arrays or abstract) of this structure.

    Args:
      config: Rates, moments, groups.
      schedule: step -> learning rate.
      params: Parameter tree, used for its paths only.

    Raises:
      ConfigError: A group pattern matches nothing.
    """
    decay = decay_multipliers(config, params)
    lr_scale = lr_multipliers(config, params)
    parts = []
    if config.clip_norm:
        parts.append(optax.clip_by_global_norm(config.clip_norm))
    adam = optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.eps)
    parts.append(_narrow_between_steps(adam, config.mu_dtype, config.nu_dtype))
    parts.append(_add_decay(config.weight_decay, decay))
    parts.append(optax.scale_by_learning_rate(schedule))
    if config.lr_multipliers:
        parts.append(_scale_by(lr_scale))
    tx = optax.chain(*parts)
    if config.freeze:
        labels = jax.tree.map(lambda t: "train" if t else "frozen", trainable(config, params))
        tx = optax.multi_transform({"train": tx, "frozen": optax.set_to_zero()}, labels)
    return tx


def lr_multipliers(config: OptimizerConfig, params: Any) -> Any:
    """A tree of learning-rate multipliers: numbers, or float32 arrays (n, 1, ...) by slice.

    Raises:
      ConfigError: A pattern matches nothing, or has not one number for each slice.
    """
    rules = tuple(
        (pattern, np.asarray(value, np.float32) if isinstance(value, tuple) else value)
        for pattern, value in config.lr_multipliers
    )
    values = match(params, rules, 1.0, "optimizer.lr_multipliers")

    def by_slice(path: tuple[Any, ...], leaf: Any, value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        if leaf.shape[:1] != value.shape:
            raise ConfigError(
                f"optimizer.lr_multipliers: {len(value)} numbers for {path_name(path)} of shape "
                f"{tuple(leaf.shape)}; one for each slice of its first axis is needed"
            )
        return value.reshape(-1, *[1] * (len(leaf.shape) - 1))

    return jax.tree_util.tree_map_with_path(by_slice, params, values)


def decay_multipliers(config: OptimizerConfig, params: Any) -> Any:
    """A tree of weight-decay multipliers; the defaults may match nothing, a user's own may not."""
    rules = tuple(config.decay)
    if rules == NO_DECAY:
        names = [path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(params)]
        rules = tuple(r for r in rules if any(re.fullmatch(r[0], name) for name in names))
    return match(params, rules, 1.0, "optimizer.decay")


def _narrow_between_steps(
    adam: optax.GradientTransformation, mu_dtype: str, nu_dtype: str
) -> optax.GradientTransformation:
    """The same steps, in float32, with moments kept in narrower dtypes between them.

    `optax.scale_by_adam(mu_dtype=)` multiplies by the decay in that dtype: 0.9 becomes 0.898, and
    updates 1.5 % smaller.
    """
    small_mu, small_nu = mu_dtype == "bfloat16", nu_dtype == "bfloat16"
    if not (small_mu or small_nu):
        return adam

    def cast(tree: Any, dtype: Any) -> Any:
        return jax.tree.map(lambda x: x.astype(dtype), tree)

    def init(params: Any) -> optax.ScaleByAdamState:
        state = adam.init(params)
        return state._replace(
            mu=cast(state.mu, jnp.bfloat16) if small_mu else state.mu,
            nu=cast(state.nu, jnp.bfloat16) if small_nu else state.nu,
        )

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        wide = state._replace(mu=cast(state.mu, jnp.float32), nu=cast(state.nu, jnp.float32))
        updates, new = adam.update(updates, wide, params)
        mu = jax.tree.map(lambda x, old: x.astype(old.dtype), new.mu, state.mu)
        if not small_nu:
            nu = jax.tree.map(lambda x, old: x.astype(old.dtype), new.nu, state.nu)
            return updates, new._replace(mu=mu, nu=nu)
        leaves, structure = jax.tree.flatten(new.nu)
        # By the step's number alone: a run that goes on draws what an unbroken one does.
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), new.count), len(leaves))
        leaves = [round_at_random(x, key) for x, key in zip(leaves, keys, strict=True)]
        return updates, new._replace(mu=mu, nu=jax.tree.unflatten(structure, leaves))

    return optax.GradientTransformation(init, update)


def round_at_random(x: jax.Array, key: jax.Array) -> jax.Array:
    """float32 to bfloat16, to one of the two neighbours so that the expected value is kept.

    What is drawn is added below the last bit that bfloat16 has; infinities stay, and so do values
    that bfloat16 can hold.
    """
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    drawn = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    kept = (bits + drawn) & jnp.uint32(0xFFFF0000)
    return jax.lax.bitcast_convert_type(kept, jnp.float32).astype(jnp.bfloat16)


def _add_decay(weight_decay: float, multipliers: Any) -> optax.GradientTransformation:
    """Adds `weight_decay * multiplier * parameter` to each update."""

    def update(updates: Any, state: Any, params: Any) -> tuple[Any, Any]:
        # Under `multi_transform` frozen leaves arrive as MaskedNode, so the multiplier tree is
        # looked up leaf by leaf rather than mapped alongside.
        def one(path: tuple[Any, ...], u: Any, p: Any) -> Any:
            m = table[path_name(path)]
            return u + weight_decay * m * p if m else u

        return jax.tree_util.tree_map_with_path(one, updates, params), state

    table = {path_name(p): m for p, m in jax.tree_util.tree_leaves_with_path(multipliers)}
    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def _scale_by(multipliers: Any) -> optax.GradientTransformation:
    """Multiplies each update by its own constant, or each of its slices."""
    table = {path_name(p): m for p, m in jax.tree_util.tree_leaves_with_path(multipliers)}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        scaled = jax.tree_util.tree_map_with_path(lambda p, u: u * table[path_name(p)], updates)
        return scaled, state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)


def describe(config: OptimizerConfig, params: Any) -> str:
    """A table of parameter groups: how many arrays and values share decay, rate and freezing."""
    groups: dict[tuple[float, tuple[float, ...], bool], list[tuple[str, int]]] = {}
    decay = decay_multipliers(config, params)
    lr_scale = jax.tree.map(lambda m: tuple(np.ravel(m).tolist()), lr_multipliers(config, params))
    train = trainable(config, params)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    columns = (decay, lr_scale, train)
    values = zip(
        *(jax.tree.leaves(c, is_leaf=lambda m: isinstance(m, tuple)) for c in columns), strict=True
    )
    for (path, leaf), key in zip(leaves, values, strict=True):
        groups.setdefault(key, []).append((path_name(path), int(leaf.size)))
    lines = ["  arrays       values  decay  lr x  e.g."]
    for (d, r, t), members in sorted(groups.items(), reverse=True):
        rate = "..".join(f"{m:4.3g}" for m in dict.fromkeys((r[0], r[-1]))) if t else "frozen"
        total, example = sum(size for _, size in members), members[0][0]
        wd = d * config.weight_decay
        lines.append(f"  {len(members):6d} {total:12,d}  {wd:5g}  {rate}  {example}")
    return "\n".join(lines)
