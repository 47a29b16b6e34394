"""S, B and L distilled from the stage-2 1B encoder: `distill.py:small`, `:base` or `:large`.

    iv2 train --config configs/stage1/distill.py:large --workdir gs://BUCKET/l_dist \
        --config.data.source=train_1.1M.csv --config.data.prefix=/data/kmash \
        --config.clip_teacher.options.weights=avp_1b_f4_coco_smit_e4.pt

Recipe: spec stage1 5 and 6.2 (101 epochs, 20 of them warm-up; masks over the whole clip). The
released `L14_dist_1B_stage2.sh` names the small model; this is the large one (spec stage1 6.2). The
teacher runs without drop path; the released code leaves it on by mistake (spec stage1 4.3).
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models import zoo

CLIPS = 268 * 4096
# size -> (global batch, chips of the mesh's fsdp axis)
SIZES = {"small": (4096, 1), "base": (4096, 1), "large": (2048, 8)}


def get_config(arg: str = "base") -> ConfigDict:
    if arg not in SIZES:
        raise ConfigError(f"distill.py:{arg}: unknown size{nearest(arg, SIZES)}")
    batch_size, fsdp = SIZES[arg]
    steps_per_epoch = CLIPS // batch_size
    student = config_lib.to_dict(zoo.get(f"internvideo2_{arg}_distill"))
    student["encoder"] |= {"drop_path_rate": 0.05, "precision": {"compute_dtype": "bfloat16"}}
    bfloat16 = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    return ConfigDict(
        {
            "stage": "distill",
            "steps": 101 * steps_per_epoch,
            "batch_size": batch_size,
            "student": student,
            "clip_teacher": {
                "name": "internvideo2_1b",
                "options": {"stage": "stage2", "weights_frames": 4, "precision": bfloat16},
            },
            "mask": {"kind": "attention", "ratio": 0.8, "scope": "clip"},
            "data": {
                "source": "train_1.1M.csv",
                "format": "pretrain",
                "num_frames": 8,
                "size": 224,
            },
            "optimizer": {
                "lr": 1e-3,
                "min_lr": 1e-5,
                "warmup_steps": 20 * steps_per_epoch,
                "clip_norm": 5.0,
            },
            "mesh": {"data": -1, "fsdp": fsdp},
            "checkpoint": {"every": 5 * steps_per_epoch},
            "log_every": 10,
        }
    )
