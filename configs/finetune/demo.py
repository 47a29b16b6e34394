"""Fine-tunes a student of the demo to tell ten video games apart, on clips of seeds not seen.

    grep '"game"' runs/demo/data/manifest.jsonl > runs/demo/data/games.jsonl
    iv2 train --config configs/finetune/demo.py --workdir runs/demo/games \
        --config.init="[{'tower': 'vision', 'path': 'runs/demo/seed0'}]"
    iv2 eval --task classification --ckpt runs/demo/games --by-class

Without `init` it trains from scratch. 300 clips are few: nothing is mixed or erased, and every clip
is always seen in its centre, decoded once.
"""

from pathlib import Path

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.train import optim

DEMO = Path(__file__).resolve().parents[1] / "demo" / "stage1.py"


def get_config(arg: str = "") -> ConfigDict:
    encoder = config_lib.read_config_file(str(DEMO))["student"]["encoder"]
    data = {
        "source": "runs/demo/data/games.jsonl",
        "num_frames": encoder["num_frames"],
        "size": encoder["image_size"],
        "sampling": "dense",
        "stride": 7,
        "augment": "center",
        "flip": False,
    }
    return ConfigDict(
        {
            "stage": "classify",
            "steps": 60,
            "batch_size": 16,
            "label": "game",
            "classifier": {
                "encoder": encoder,
                "num_classes": 10,
                "head_init_scale": 1.0,
            },
            "data": data | {"split": "train", "fixed_view": True, "keep_gb": 0.5},
            "eval_data": data | {"split": "test", "eval": True},
            "optimizer": {
                "lr": 1e-3,
                "min_lr": 1e-5,
                "warmup_steps": 6,
                "scale_lr_by_batch": False,
                "b2": 0.999,
                "eps": 1e-8,
                "clip_norm": 1.0,
                "lr_multipliers": optim.layer_decay(0.75, encoder["depth"]),
            },
            "eval_every": 20,
            "log_every": 10,
            "checkpoint": {"every": 60},
        }
    )
