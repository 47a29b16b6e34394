"""Probes of a frozen encoder: `probe.py:SIZE,PROBE`, such as `1b,ap_k400` or `6b,lp_ssv2`.

    iv2 train --config configs/finetune/probe.py:1b,lp_k400 --workdir gs://BUCKET/lp_k400_1b \
        --config.data.source=k400/train.csv --config.data.prefix=/data/k400 \
        --config.eval_data.source=k400/val.csv --config.eval_data.prefix=/data/k400 \
        --config.init="[{'tower': 'vision', 'path': 'gs://BUCKET/s1_1b'}]"
    iv2 eval --task classification --ckpt gs://BUCKET/lp_k400_1b --data k400/test.csv

Recipe: spec stage1 6.4. `lp_` trains the head alone (on SSv2 with the class token and the mean of
each frame beside the pooled vector), `ap_` the attention pool too (on SSv2 with a residual MLP);
`anet` and `hacs` are attentive probes although the paper's table calls them fine-tuning. Attentive
probes start from stage 1 overlaid by stage 2, two inits of tower `vision` in this order; those of
K400, K600, K700 and MiT from the K710 probe (tower `model` with `rows`), `anet` and `hacs` from a
K400-tuned model (`rows`: `fresh`).

Where the spec leaves a gap: clips of a set are as published (an epoch's steps follow from them);
the group of mixing is the rows of a GPU. The batch goes through whole: no gradient reaches the
blocks, so nothing of them is kept. None of this has been run on hardware.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models import zoo

FRAMES = 16


class Probe(NamedTuple):
    """One line of spec stage1 6.4; 1B's and 6B's numbers where they differ."""

    clips: int
    classes: int
    batch: int | tuple[int, int]
    epochs: int | tuple[int, int]
    warmup: int | tuple[int, int]
    lr: float | tuple[float, float]
    views: tuple[int, int] = (1, 3)
    head: str = "plain"
    dropout: float = 0.0
    min_lr: float | tuple[float, float] = 0.0
    ops: tuple[int, float, float] = (2, 5.0, 0.25)  # RandAugment
    group: int | tuple[int, int] = 64  # rows of a GPU
    sampling: str = "segments"


PROBES = {
    "ap_k710": Probe(658_000, 710, 1024, (25, 20), (5, 4), (2e-4, 1e-4), group=(64, 32)),
    "ap_k400": Probe(240_000, 400, 1024, 3, 0, 1e-5),
    "ap_k600": Probe(390_000, 600, 1024, 3, 0, 1e-5),
    "ap_k700": Probe(536_000, 700, 1024, 3, 0, 1e-5),
    "ap_mit": Probe(792_000, 339, (1024, 2048), (35, 30), 5, (2e-4, 1e-4)),
    "ap_ssv2": Probe(
        169_000, 174, 1024, (25, 20), (5, 4), (2e-4, 1e-4), head="ap", sampling="frames"
    ),
    "lp_k400": Probe(240_000, 400, 1024, (15, 9), (3, 2), (1e-3, 5e-4), min_lr=1e-6),
    "lp_ssv2": Probe(
        169_000, 174, 1024, (25, 20), (5, 4), 1e-4, head="cls_avgN_proj", sampling="frames"
    ),
    "lp_ucf101": Probe(9_537, 101, 512, 20, 0, 1e-3, (2, 1), dropout=0.5, sampling="dense"),
    "lp_hmdb51": Probe(3_570, 51, 512, 20, 0, 2e-3, (2, 1), dropout=0.3, sampling="video"),
    "anet": Probe(10_024, 200, 1024, 40, 0, 2e-4, (4, 3), dropout=0.5, ops=(4, 7.0, 0.5)),
    "hacs": Probe(37_612, 200, 1024, 40, 0, 2e-4, (4, 3), dropout=0.5, ops=(4, 7.0, 0.5)),
}
SIZES = ("1b", "6b")


def get_config(arg: str = "1b,ap_k400") -> ConfigDict:
    size, _, name = arg.partition(",")
    if size not in SIZES or name not in PROBES:
        known = [f"{s},{n}" for s in SIZES for n in PROBES]
        raise ConfigError(f"probe.py:{arg}: no such probe{nearest(arg, known)}")
    probe = Probe(*(_of(size, v) if i in _TWO else v for i, v in enumerate(PROBES[name])))
    steps_per_epoch = max(probe.clips // probe.batch, 1)
    directed = name.endswith("ssv2")
    data = {
        "source": "train.csv",
        "format": "frames" if directed else "kinetics",
        "num_frames": FRAMES,
        "size": 224,
        "sampling": probe.sampling,
    }
    ops, magnitude, deviation = probe.ops
    freeze = {"freeze": ("encoder/.*",)}
    if not name.startswith("lp_"):
        freeze["open"] = ("encoder/pool/.*",)
    return ConfigDict(
        {
            "stage": "classify",
            "steps": probe.epochs * steps_per_epoch,
            "batch_size": probe.batch,
            "classifier": {
                "encoder": config_lib.to_dict(zoo.get(f"internvideo2_{size}"))
                | {"num_frames": FRAMES, "precision": {"compute_dtype": "bfloat16"}},
                "num_classes": probe.classes,
                "head": probe.head,
                "dropout": probe.dropout,
            },
            "data": data
            | {
                "augment": "finetune_crop",
                "crop_area": (0.08, 1.0),
                "rand_augment": {"ops": ops, "magnitude": magnitude, "deviation": deviation},
                "flip": not directed,
            },
            "eval_data": data | {"source": "val.csv", "augment": "center", "eval": True},
            "test_views": probe.views[0],
            "test_crops": probe.views[1],
            "label_smoothing": 0.1,
            "mixup": {"mixup": 0.8, "cutmix": 1.0, "group": probe.group},
            "erasing": {"probability": 0.25},
            "optimizer": {
                "lr": probe.lr,
                "min_lr": probe.min_lr,
                "warmup_lr": 1e-6,
                "warmup_steps": probe.warmup * steps_per_epoch,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.0,
                "clip_norm": 0.0,
                **freeze,
            },
            "mesh": {"data": -1, "fsdp": 16},
            "checkpoint": {"every": steps_per_epoch},
            "eval_every": steps_per_epoch,
            "log_every": 10,
        }
    )


# Fields that may have a number for each size.
_TWO = tuple(map(Probe._fields.index, ("batch", "epochs", "warmup", "lr", "min_lr", "group")))


def _of(size: str, value: float | tuple[float, float]) -> float:
    """The number of a size."""
    return value[SIZES.index(size)] if isinstance(value, tuple) else value
