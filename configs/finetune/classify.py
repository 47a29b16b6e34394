"""Fine-tuning of a whole video classifier: `classify.py:SIZE,SET[,FRAMES]`.

    iv2 train --config configs/finetune/classify.py:1b,k710 --workdir gs://BUCKET/k710_1b \
        --config.data.source=k710/train.csv --config.data.prefix=/data/k710 \
        --config.eval_data.source=k710/val.csv --config.eval_data.prefix=/data/k710 \
        --config.init="[{'tower': 'vision', 'path': 'gs://BUCKET/s1_1b'}]"
    iv2 train --config configs/finetune/classify.py:1b,k400,16 --workdir gs://BUCKET/k400_1b_f16 \
        --config.init="[{'tower': 'model', 'path': 'gs://BUCKET/k710_1b', 'rows': 'first'}]"
    iv2 eval --task classification --ckpt gs://BUCKET/k400_1b_f16 --data k400/test.csv

Recipe: spec stage1 6.3 and 7.4. SIZE is small, base, large, 1b or 6b; FRAMES 8 or 16. K710 starts
from stage 1 or the distilled student (tower `vision`), K400, K600 and K700 from K710 (`rows`:
`first`, label_mixto600.json, label_mixto700.json), MiT from K400 (`rows`: `fresh`), SSv1 and SSv2
from stage 1. Lists are train.csv, val.csv and test.csv (path, label; SSv1 and SSv2: folder, frames,
label).

Where the spec leaves a gap: clips of a set are as published (an epoch's steps follow from them); B
and L on SSv2 take S's and the "B14" script's numbers (the released scripts name the wrong models);
16 frames of SSv2 and MiT take the recipe of 8. `batch_size` counts clips, each shown in two copies
where the recipe has `num_sample` 2, so the rates are those of the scripts times the copies.

The mesh splits parameters over 16 chips; the batch goes through in parts so that they fit into
16 GB each. On n times as many chips, divide `--config.accumulate` by n. None of this has been run
on hardware.
"""

from typing import NamedTuple

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models import zoo
from iv2_jax.train import optim


class Recipe(NamedTuple):
    """One line of spec stage1 6.3; rates are per 256 clips, for one copy of each."""

    batch: int
    epochs: int
    warmup: int
    lr: float
    decay: float
    drop_path: float
    group: int  # rows of a GPU, both copies: what is mixed among itself
    min_lr: float = 1e-6


# set -> clips of the training list, classes, copies of a clip (num_sample), test views x crops
SETS = {
    "k710": (658_000, 710, 2, (4, 3)),
    "k400": (240_000, 400, 2, (4, 3)),
    "k600": (390_000, 600, 2, (4, 3)),
    "k700": (536_000, 700, 2, (4, 3)),
    "mit": (792_000, 339, 1, (4, 3)),
    "ssv2": (169_000, 174, 2, (2, 3)),
    "ssv1": (86_000, 174, 2, (2, 3)),
}

RECIPES = {
    ("1b", "k710"): Recipe(256, 9, 2, 5e-5, 0.9, 0.3, 16),
    ("6b", "k710"): Recipe(256, 6, 1, 2.5e-5, 0.915, 0.35, 8, min_lr=0.0),
    ("small", "k710"): Recipe(256, 35, 5, 2e-4, 0.75, 0.1, 64),
    ("base", "k710"): Recipe(256, 20, 4, 2e-4, 0.75, 0.1, 32),
    ("large", "k710"): Recipe(256, 14, 2, 2e-4, 0.75, 0.1, 32),
    ("1b", "kinetics"): Recipe(256, 3, 0, 1e-5, 0.9, 0.3, 16),
    ("6b", "kinetics"): Recipe(256, 1, 0, 1e-5, 0.915, 0.35, 8),
    ("6b", "kinetics", 16): Recipe(128, 1, 0, 1e-5, 0.915, 0.35, 4),
    ("small", "kinetics"): Recipe(1024, 5, 1, 2e-5, 0.75, 0.1, 64),
    ("base", "kinetics"): Recipe(1024, 5, 1, 2e-5, 0.75, 0.1, 64),
    ("large", "kinetics"): Recipe(1024, 5, 1, 2e-5, 0.75, 0.1, 64),
    ("1b", "mit"): Recipe(256, 15, 5, 5e-5, 0.9, 0.3, 8),
    ("6b", "mit"): Recipe(256, 8, 2, 2.5e-5, 0.915, 0.35, 4, min_lr=0.0),
    ("1b", "ssv2"): Recipe(256, 8, 3, 1e-4, 0.915, 0.3, 16),
    ("6b", "ssv2"): Recipe(256, 6, 2, 7.5e-5, 0.915, 0.4, 8, min_lr=0.0),
    ("small", "ssv2"): Recipe(256, 30, 5, 5e-4, 0.75, 0.1, 64),
    ("base", "ssv2"): Recipe(256, 30, 5, 5e-4, 0.75, 0.1, 64),
    ("large", "ssv2"): Recipe(256, 10, 2, 2e-4, 0.85, 0.2, 32),
    ("1b", "ssv1"): Recipe(256, 9, 3, 1e-4, 0.915, 0.3, 16),
    ("6b", "ssv1"): Recipe(256, 7, 2, 7.5e-5, 0.915, 0.4, 8),
}
# Where the test's views differ from the set's.
VIEWS = {("6b", "ssv2"): (5, 3), ("6b", "ssv1"): (4, 3), ("small", "ssv2"): (4, 3)}
# size -> parts of a batch on 16 chips at 8 frames, chips that share the parameters, what the
# backward pass computes again. More parts gather weights more often; fewer rows at once leave
# room to keep what their backward pass needs.
PARTS = {
    "small": (1, 1, "full"),
    "base": (1, 1, "full"),
    "large": (2, 16, "full"),
    "1b": (8, 16, "named"),
    "6b": (4, 16, "full"),
}


def recipe(size: str, task: str, frames: int) -> Recipe:
    """The line of a size, a set and a number of frames."""
    family = "kinetics" if task in ("k400", "k600", "k700") else task
    for key in ((size, family, frames), (size, family)):
        if key in RECIPES:
            return RECIPES[key]
    known = ["{},{}".format(*key[:2]) for key in RECIPES]
    raise ConfigError(f"classify.py: no recipe {size},{task}{nearest(f'{size},{family}', known)}")


def get_config(arg: str = "1b,k400") -> ConfigDict:
    size, _, rest = arg.partition(",")
    task, _, given = rest.partition(",")
    if task not in SETS:
        raise ConfigError(f"classify.py:{arg}: unknown set {task!r}{nearest(task, SETS)}")
    if given not in ("", "8", "16"):
        raise ConfigError(f"classify.py:{arg}: FRAMES is 8 or 16, not {given!r}")
    frames = int(given or 8)
    r = recipe(size, task, frames)
    clips, classes, copies, views = SETS[task]
    views = VIEWS.get((size, task), views)
    steps_per_epoch = clips // r.batch
    parts, fsdp, remat = PARTS[size]
    encoder = zoo.get(f"internvideo2_{size}")
    classifier = {
        "encoder": config_lib.to_dict(encoder)
        | {
            "num_frames": frames,
            "drop_path_rate": r.drop_path,
            "remat": remat,
            "precision": {"compute_dtype": "bfloat16"},
        },
        "num_classes": classes,
    }
    folders = task in ("ssv1", "ssv2")
    data = {
        "source": "train.csv",
        "format": "frames" if folders else "kinetics",
        "num_frames": frames,
        "size": 224,
        "sampling": "frames" if folders else "segments",
    }
    return ConfigDict(
        {
            "stage": "classify",
            "steps": r.epochs * steps_per_epoch,
            "batch_size": r.batch,
            "classifier": classifier,
            "data": data
            | {
                "augment": "finetune_crop",
                "crop_area": (0.08, 1.0),
                "rand_augment": {"ops": 4, "magnitude": 7.0, "deviation": 0.5},
                "flip": not folders,
                "views": copies,
                "shared_frames": True,
            },
            "eval_data": data | {"source": "val.csv", "augment": "center", "eval": True},
            "test_views": views[0],
            "test_crops": views[1],
            "label_smoothing": 0.1,
            "mixup": {"mixup": 0.8, "cutmix": 1.0, "group": r.group},
            "erasing": {"probability": 0.25},
            # Twice the tokens, half the rows at once.
            "accumulate": parts * (frames // 8),
            "optimizer": {
                "lr": r.lr * copies,
                "min_lr": r.min_lr * copies,
                "warmup_lr": 1e-6 * copies,
                "warmup_steps": r.warmup * steps_per_epoch,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 0.0,
                "lr_multipliers": optim.layer_decay(r.decay, encoder.depth),
            },
            "mesh": {"data": -1, "fsdp": fsdp},
            "checkpoint": {"every": max(steps_per_epoch // 2, 1)},
            "eval_every": steps_per_epoch,
            "log_every": 10,
        }
    )
