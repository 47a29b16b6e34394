"""Pictures of the report: curves, masked frames, neighbours; all as inline SVG or JPEG."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from iv2_jax.data.pipeline import Loader
from iv2_jax.eval.answers_stats import wilson

# One colour a seed or a side, readable for the colour-blind.
COLOURS = ("#2563a8", "#d9792b", "#3a8a5f", "#8d5fb0", "#b5443c")
TRAINED, RANDOM = COLOURS[0], "#a8b0ba"
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#8a94a0",
    "axes.labelcolor": "#39424e",
    "xtick.color": "#5b6672",
    "ytick.color": "#5b6672",
    "font.size": 8.5,
    "svg.fonttype": "none",
    "font.family": "sans-serif",
}


def loss_curves(runs: Sequence[Path]) -> str:
    """SVG: training loss of each seed, and the loss on held-out clips as dots."""
    from iv2_jax.train.metrics import read_metrics

    with _figure(7.2, 3.1) as (figure, axes):
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            train, held_out = read_metrics(run, "train"), read_metrics(run, "eval")
            steps, losses = _series(train, "loss")
            axes.plot(steps, losses, color=colour, alpha=0.35, lw=0.8)
            axes.plot(steps, _smooth(losses), color=colour, lw=1.6, label=run.name)
            axes.plot(*_series(held_out, "loss"), "o", color=colour, ms=5, mec="white")
        axes.set_xlabel("step")
        axes.set_ylabel("loss (dots: held-out clips)")
        axes.legend(frameon=False)
        return _svg(figure)


def term_curves(run: Path) -> str:
    """SVG: each loss term on held-out clips and the learning rate of one run."""
    from iv2_jax.train.metrics import read_metrics

    with _figure(7.2, 2.6, columns=2) as (figure, (left, right)):
        held_out, train = read_metrics(run, "eval"), read_metrics(run, "train")
        names = sorted(n for n in held_out[0] if n.startswith("loss_"))
        for name, colour in zip(names, _colours(len(names)), strict=True):
            left.plot(
                *_series(held_out, name), "o-", color=colour, label=name.removeprefix("loss_"), ms=4
            )
        left.set_xlabel("step")
        left.set_ylabel("held-out loss term")
        left.legend(frameon=False)
        right.plot(*_series(train, "lr"), color=COLOURS[0])
        right.set_xlabel("step")
        right.set_ylabel("learning rate")
        return _svg(figure)


def align_curves(runs: Sequence[Path]) -> str:
    """SVG: training loss of each stage-2 run, and the terms of the first one, smoothed."""
    from iv2_jax.train.metrics import read_metrics

    with _figure(7.2, 2.8, columns=2) as (figure, (left, right)):
        for run, colour in zip(runs, _colours(len(runs)), strict=True):
            steps, losses = _series(read_metrics(run, "train"), "loss")
            left.plot(steps, losses, color=colour, alpha=0.3, lw=0.8)
            left.plot(steps, _smooth(losses), color=colour, lw=1.6, label=run.name)
            left.plot(*_series(read_metrics(run, "eval"), "loss"), "o", color=colour, ms=5)
        left.set_ylabel("loss (dots: held-out clips)")
        train = read_metrics(runs[0], "train")
        names = [name for name in train[0] if name.startswith("loss_")]
        for name, colour in zip(names, _colours(len(names)), strict=True):
            steps, losses = _series(train, name)
            right.plot(steps, _smooth(losses), color=colour, label=name.removeprefix("loss_"))
            held_out = _series(read_metrics(runs[0], "eval"), name)
            right.plot(*held_out, "o", color=colour, ms=4)
        right.set_ylabel(f"terms of {runs[0].name}")
        for axes in (left, right):
            axes.set_xlabel("step")
            axes.set_ylim(bottom=0)
            axes.legend(frameon=False)
        return _svg(figure)


def recall_bars(found: Mapping[str, Any], kinds: Mapping[str, str]) -> str:
    """SVG: recalls on held-out clips, a bar a kind and a dot a seed; chance as a dashed line.

    Args:
      found: Kind -> recall (`t2v_r1`, ...) -> a value a seed.
      kinds: Kind -> its name in the legend; `chance` is drawn as a line.
    """
    recalls = {"t2v_r1": "text→video R@1", "t2v_r5": "R@5", "v2t_r1": "video→text R@1"}
    recalls["v2t_r5"] = "R@5 "
    bars = [kind for kind in kinds if kind != "chance"]
    width = 0.8 / len(bars)
    colours = (TRAINED, COLOURS[2], RANDOM, "#dfe4ea")
    with _figure(7.2, 2.8) as (figure, axes):
        for i, (kind, colour) in enumerate(zip(bars, colours, strict=False)):
            for group, recall in enumerate(recalls):
                x, values = group - 0.4 + (i + 0.5) * width, found[kind][recall]
                label = kinds[kind] if group == 0 else None
                axes.bar(x, np.mean(values), 0.9 * width, color=colour, label=label)
                axes.plot([x] * len(values), values, ".", color="black", ms=4)
        for group, recall in enumerate(recalls):
            level = np.mean(found["chance"][recall])
            axes.plot([group - 0.42, group + 0.42], [level] * 2, color="#b5443c", lw=1.2, ls="--")
        axes.set_xticks(range(len(recalls)), recalls.values())
        axes.set_ylim(0, 1)
        axes.legend(frameon=False, fontsize=7.5, ncols=2, loc="upper left")
        return _svg(figure)


def probe_bars(probes: Mapping[str, Any]) -> str:
    """SVG: accuracy on held-out clips, trained against random weights, a dot a seed."""
    names = list(probes)
    with _figure(7.2, 2.8, columns=2) as (figure, panels):
        for axes, kind, title in zip(
            panels, ("linear", "knn"), ("linear probe", "10-NN"), strict=True
        ):
            for i, name in enumerate(names):
                for side, key, colour in ((-0.2, kind, TRAINED), (0.2, f"{kind}_random", RANDOM)):
                    values = probes[name][key]
                    if not values:
                        continue
                    axes.bar(i + side, np.mean(values), 0.36, color=colour)
                    axes.plot([i + side] * len(values), values, ".", color="black", ms=4)
                majority = probes[name]["majority"]
                axes.plot([i - 0.42, i + 0.42], [majority] * 2, color="#b5443c", lw=1.2, ls="--")
            axes.set_xticks(range(len(names)), names)
            axes.set_ylim(0, 1)
            axes.set_title(title, fontsize=9)
        return _svg(figure)


def answer_intervals(tasks: Mapping[str, Mapping[str, Any]]) -> str:
    """SVG: share of right answers with the own clip and with another, and their difference.

    Args:
      tasks: Kind of question -> `own`, `other`, `difference`, `low`, `high`, `chance`, `questions`.
    """
    names = list(tasks)[::-1]
    with _figure(7.2, 0.8 + 0.42 * len(names), columns=2) as (figure, (left, right)):
        for row, name in enumerate(names):
            found = tasks[name]
            for shift, key, colour in ((0.14, "own", TRAINED), (-0.14, "other", "#7d8792")):
                label = {"own": "own clip", "other": "another clip"}[key] if row == 0 else None
                low, high = wilson(round(found[key] * found["questions"]), found["questions"])
                left.plot([low, high], [row + shift] * 2, color=colour, lw=1.6)
                left.plot(found[key], row + shift, "o", color=colour, ms=5.5, label=label)
            left.plot([found["chance"]] * 2, [row - 0.3, row + 0.3], "--", color="#b5443c", lw=1.2)
            right.plot([found["low"], found["high"]], [row, row], color=TRAINED, lw=1.6)
            right.plot(found["difference"], row, "o", color=TRAINED, ms=5.5)
        for axes in (left, right):
            axes.set_ylim(-0.5, len(names) - 0.5)
        left.set_yticks(range(len(names)), names)
        left.set_xlim(-0.03, 1.03)
        left.set_xlabel("share of right answers")
        right.axvline(0, color="#8a94a0", lw=0.8)
        right.set_yticks(range(len(names)), [""] * len(names))
        right.set_xlim(min(-0.3, right.get_xlim()[0]), 1.03)
        right.set_xlabel("difference, paired, 95 %")
        figure.legend(frameon=False, ncols=2, loc="outside upper center", fontsize=8)
        return _svg(figure)


def frame_strip(frames: np.ndarray) -> str:
    """A JPEG of the frames (T, H, W, 3) of a clip side by side."""
    return _strip(np.asarray(frames).astype(np.uint8))


def _spread_clips(batches: Loader, rows: int) -> np.ndarray:
    """Clips (rows, T, H, W, 3) that lie far apart in the list, so that not all are of one kind."""
    count = len(batches.source)
    wanted = set(((np.arange(rows) + 0.5) * count / rows).astype(int).tolist())
    found = [
        video
        for batch in batches
        for index, video, valid in zip(batch["index"], batch["video"], batch["valid"], strict=True)
        if valid and int(index) in wanted
    ]
    return np.stack(found)


def masked_frames(run: Path, rows: int = 4) -> list[dict[str, str]]:
    """What the student sees of held-out clips.

    Returns:
      For each clip: JPEGs of its `frames`, of what `guided` the mask, and of the `visible` patches.
    """
    import jax
    import jax.numpy as jnp

    from iv2_jax.train import loop

    config = loop.read_config(str(run / "config.json"), {})
    stage = config.make_stage()
    video = jnp.asarray(_spread_clips(stage.eval_batches(), rows))
    frozen = jax.tree.map(jnp.asarray, stage.load_teachers())
    outputs = jax.jit(stage.teach)(frozen, video)
    grid = config.student.encoder.grid
    saliency = stage.saliency(outputs, len(video))
    visible = stage.draw_visible(saliency, jax.random.key(0))
    heat = np.asarray(saliency).reshape(-1, *grid)
    shown = np.zeros((len(video), config.student.encoder.num_patches), bool)
    np.put_along_axis(shown, np.asarray(visible)[:, 1:] - 1, True, axis=1)
    frames = np.asarray(video[:, :: config.frame_stride])
    return [
        {
            "frames": _strip(clip),
            "guided": _strip(_heat(h.repeat(len(clip) // len(h), 0), clip.shape[1])),
            "visible": _strip(_hide(clip, s.reshape(grid))),
        }
        for clip, h, s in zip(frames, heat, shown, strict=True)
    ]


def thumbnails(config: Any, source: Any, rows: Sequence[int], size: int = 96) -> list[str]:
    """JPEGs of the middle frame of clips, read by the evaluation's own pipeline.

    Args:
      config: A `DataConfig` that reads clips in order.
      source: The split's clips.
      rows: Which clips.
      size: Side in pixels.
    """
    from iv2_jax.data.pipeline import make_loader

    wanted, found = set(rows), {}
    with make_loader(config, seed=0, global_batch=16, source=source) as loader:
        for batch in loader:
            for row, clip in zip(batch["index"].tolist(), batch["video"], strict=True):
                if row in wanted:
                    found[row] = _jpeg(Image.fromarray(clip[len(clip) // 2]).resize((size, size)))
            if wanted <= found.keys():
                break
    return [found[row] for row in rows]


def _heat(values: np.ndarray, size: int) -> np.ndarray:
    """(T, H, W) weights -> (T, size, size, 3) uint8 in a perceptual colour map."""
    import matplotlib

    low, high = values.min(), values.max()
    coloured = matplotlib.colormaps["magma"]((values - low) / max(high - low, 1e-12))[..., :3]
    factor = size // values.shape[1]
    coloured = coloured.repeat(factor, 1).repeat(factor, 2)
    return (255 * coloured).astype(np.uint8)


def _hide(clip: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Paints the hidden patches of (T, S, S, 3) grey."""
    frames = len(clip) // shown.shape[0]
    factor = clip.shape[1] // shown.shape[1]
    mask = shown.repeat(frames, 0).repeat(factor, 1).repeat(factor, 2)[..., None]
    return np.where(mask, clip, np.uint8(232))


def _strip(frames: np.ndarray, height: int = 84) -> str:
    """A JPEG of the frames side by side with a thin gap."""
    gap = np.full((frames.shape[1], 2, 3), 255, np.uint8)
    parts = [part for frame in frames for part in (frame, gap)][:-1]
    image = Image.fromarray(np.concatenate(parts, axis=1))
    width = round(image.width * height / image.height)
    return _jpeg(image.resize((width, height), Image.Resampling.LANCZOS))


def _jpeg(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=86)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colours(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def _series(lines: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    return [line["step"] for line in lines], [float(line[name]) for line in lines]


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, started at the first value."""
    out, average = [], values[0]
    for value in values:
        average = weight * average + (1 - weight) * value
        out.append(average)
    return out


@contextmanager
def _figure(width: float, height: float, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """A styled figure and its axes, without a display, closed on the way out."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(1, columns, figsize=(width, height), layout="constrained")
        try:
            yield figure, axes
        finally:
            pyplot.close(figure)


def _svg(figure: Any) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    text = buffer.getvalue()
    return text[text.index("<svg") :]
