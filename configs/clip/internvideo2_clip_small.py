"""InternVideo2-CLIP S, B, L: `internvideo2_clip_small.py:small`, `:base` or `:large`.

    iv2 train --config configs/clip/internvideo2_clip_small.py:large --workdir gs://BUCKET/clip_l \
        --config.init.0.path=L14_dist_1B_stage2.pth --config.init.1.path=mobileclip_blt.pt \
        --config.data.media.video.prefix=/data/webvid

The encoder distilled from the stage-2 1B (`configs/stage1/distill.py`) meets MobileCLIP-B's text
tower. Recipe: spec stage2 7.4 (data_25m: webvid_10m, cc3m, coco, vg, sbu, cc12m; batch 4096, 3
epochs, 0.6 of them warm-up). Trained are the pool, the map to the text's width and the temperature:
1,136,769 parameters of S, 2,762,241 of B, 4,337,409 of L. `:large,full` trains everything; its
rates are ours, nothing of it is published. The released run scaled the gradient through the
features by 1/16 (`loss.feature_gradient`), which is off here. Not run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models import zoo

BATCH_SIZE = 16 * 256
EPOCHS, WARMUP = 3, 0.6
STEPS_PER_EPOCH = 25_000_000 // BATCH_SIZE
STUDENTS = {
    "small": "S14_dist_1B_stage2.pth",
    "base": "B14_dist_1B_stage2.pth",
    "large": "L14_dist_1B_stage2.pth",
}
MODES = ("pool", "full")


def get_config(arg: str = "base") -> ConfigDict:
    size, _, mode = arg.partition(",")
    mode = mode or "pool"
    for word, known in ((size, STUDENTS), (mode, MODES)):
        if word not in known:
            raise ConfigError(f"internvideo2_clip_small.py:{arg}: {word!r}{nearest(word, known)}")
    clip = config_lib.to_dict(zoo.get(f"internvideo2_clip_{size}"))
    for tower in ("vision", "text"):
        clip[tower]["precision"] = {"compute_dtype": "bfloat16"}
    full = mode == "full"
    if full:
        clip["vision"] |= {"drop_path_rate": 0.1, "remat": "named"}
    text = {"tokenizer": "mobileclip", "max_length": 77, "min_words": 2}
    text["path"] = "bpe_simple_vocab_16e6.txt.gz"
    data = {"size": 224, "augment": "random_resized_crop", "text": text}
    return ConfigDict(
        {
            "stage": "clip",
            "steps": EPOCHS * STEPS_PER_EPOCH,
            "batch_size": BATCH_SIZE,
            "clip_small": clip,
            "init": [
                {"tower": "vision", "path": STUDENTS[size]},
                {"tower": "text", "path": "mobileclip_blt.pt"},
            ],
            "loss": {"frame_tokens": 2},
            "data": {
                "media": {
                    "image": {
                        **data,
                        "media": "image",
                        "corpora": [
                            {"source": f"{name}.json"}
                            for name in ("cc3m", "coco", "vg", "sbu", "cc12m")
                        ],
                    },
                    "video": {
                        **data,
                        "media": "video",
                        "source": "webvid_10m.json",
                        "num_frames": 8,
                        "sampling": "middle",  # in training one at random of each eighth
                    },
                }
            },
            "optimizer": {
                "lr": 1e-5 if full else 4e-4,
                "min_lr": 1e-7 if full else 4e-6,
                "schedule": "floored",
                "warmup_steps": round(WARMUP * STEPS_PER_EPOCH),
                "scale_lr_by_batch": False,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.2,
                "clip_norm": 1.0 if full else 0.0,
                "decay": [
                    ("temp", 0.0),
                    ("text_encoder/.*", 0.0),
                    (".*/(bias|scale|gamma)", 0.0),
                    ("vision_encoder/(cls_token|pos_embed)", 0.0),
                ],
                "freeze": [] if full else ["vision_encoder/.*", "text_encoder/.*"],
                "open": [] if full else ["vision_encoder/pool/.*"],
            },
            "seed": 42,
            "mesh": {"data": -1, "fsdp": 1},
            "checkpoint": {"every": STEPS_PER_EPOCH},
            "log_every": 10,
        }
    )
