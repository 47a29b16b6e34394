"""Stage 1 of InternVideo2-6B: the same teachers, a 6B student, 2M clips.

    iv2 train --config configs/stage1/internvideo2_6b.py --workdir gs://BUCKET/s1_6b \
        --config.data.source=train_2M.csv --config.data.prefix=/data/kmash \
        --config.clip_teacher.options.weights=internvl_c_13b_224px.pth \
        --config.mae_teacher.options.weights=vit_g_hybrid_1200e_pre.pth

Recipe: spec stage1 6.2 (batch 2048, 301 epochs of 976 steps). The mesh is for 256 chips, 8 clips a
chip. None of this has been run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.models import zoo

STEPS_PER_EPOCH = 976


def get_config(arg: str = "") -> ConfigDict:
    student = config_lib.to_dict(zoo.get("internvideo2_6b_pretrain"))
    student["encoder"] |= {
        "drop_path_rate": 0.3,
        "remat": "named",
        "precision": {"compute_dtype": "bfloat16"},
    }
    bfloat16 = {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}
    return ConfigDict(
        {
            "stage": "distill",
            "steps": 301 * STEPS_PER_EPOCH,
            "batch_size": 2048,
            "student": student,
            "clip_teacher": {"name": "internvl_6b", "options": {"precision": bfloat16}},
            "mae_teacher": {"name": "videomaev2_g", "options": {"precision": bfloat16}},
            "mask": {"kind": "attention", "ratio": 0.8, "scope": "frame"},
            "data": {
                "source": "train_2M.csv",
                "format": "pretrain",
                "num_frames": 16,
                "size": 224,
            },
            "optimizer": {
                "lr": 1.5e-4,
                "min_lr": 1e-5,
                "warmup_steps": 40 * STEPS_PER_EPOCH,
                "clip_norm": 3.0,
            },
            "mesh": {"data": 4, "fsdp": 64},
            "checkpoint": {"every": STEPS_PER_EPOCH},
            "log_every": 10,
        }
    )
