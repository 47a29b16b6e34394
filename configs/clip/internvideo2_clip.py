"""InternVideo2-CLIP 1B and 6B: the attentive pool tuned over the stage-2 encoder and InternVL-C's
text, `:1b` or `:6b`.

    iv2 train --config configs/clip/internvideo2_clip.py:1b --workdir gs://BUCKET/clip_1b \
        --config.init.0.path=InternVideo2-stage2_1b-224p-f4.pt \
        --config.init.1.path=internvl_c_13b_224px.pth \
        --config.data.media.video.prefix=/data/webvid

Recipe: spec stage2 7.4 (data_25m: webvid_10m, cc3m, coco, vg, sbu, cc12m; 1B: batch 4096, 3 epochs,
0.6 of them warm-up; 6B: batch 2048, 1 epoch, 0.2 of it warm-up). 7,042,177 (6B: 33,207,169)
parameters are trained: the pool and the temperature. `:1b,full` trains everything, `:1b,lora`
adapters in the text tower beside the pool; their rates are ours, nothing of them is published. The
released run scaled the gradient through the features by 1/16 (`loss.feature_gradient`) and left the
frozen towers' DropPath on (`frozen_towers_in_train_mode`); both are off here. The meshes are for 32
and 64 chips. None of this has been run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models import zoo
from iv2_jax.models.text.llama_clip import LORA, LORA_TARGETS

CLIPS = 25_000_000
# Batch size, epochs, epochs of warm-up, file of the vision tower, fsdp axis of the mesh.
SIZES = {
    "1b": (16 * 256, 3, 0.6, "InternVideo2-stage2_1b-224p-f4.pt", 16),
    "6b": (16 * 128, 1, 0.2, "InternVideo2-Stage2_6B", 32),
}
MODES = ("pool", "lora", "full")


def get_config(arg: str = "1b") -> ConfigDict:
    size, _, mode = arg.partition(",")
    mode = mode or "pool"
    for name, known in ((size, SIZES), (mode, MODES)):
        if name not in known:
            raise ConfigError(f"internvideo2_clip.py:{arg}: unknown {name!r}{nearest(name, known)}")
    batch_size, epochs, warmup, vision, fsdp = SIZES[size]
    epoch = CLIPS // batch_size
    model = zoo.get(f"internvideo2_clip_{size}")
    clip = config_lib.to_dict(model)
    clip["vision"]["precision"] = {"compute_dtype": "bfloat16"}
    clip["text"]["decoder"]["precision"] = {
        # What is never updated loses nothing by being kept as it was released.
        "param_dtype": "float32" if mode == "full" else "bfloat16",
        "compute_dtype": "bfloat16",
    }
    frozen = ["vision_encoder/.*", "text_encoder/.*"]
    opened = ["vision_encoder/pool/.*"]
    if mode == "full":
        frozen = opened = []
        clip["vision"]["remat"], clip["text"]["decoder"]["remat"] = "named", "dots"
    if mode == "lora":
        opened.append("text_encoder/.*/lora_[ab]")
        clip["text"]["decoder"] |= {
            "lora": config_lib.to_dict(LORA),
            "lora_targets": LORA_TARGETS,
            "remat": "dots",
        }
    text = {"tokenizer": "llama_clip", "path": "tokenizer.model", "max_length": 80, "min_words": 2}
    data = {"size": 224, "augment": "random_resized_crop", "text": text}
    return ConfigDict(
        {
            "stage": "clip",
            "steps": epochs * epoch,
            "batch_size": batch_size,
            "clip": clip,
            "init": [
                {"tower": "vision", "path": vision},
                {"tower": "text", "path": "internvl_c_13b_224px.pth"},
            ],
            "loss": {"frame_tokens": 5},  # start, "summarize:" in three, end
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
                "lr": 1e-5 if mode == "full" else 4e-4,
                "min_lr": 1e-7 if mode == "full" else 4e-6,
                "schedule": "floored",
                "warmup_steps": round(warmup * epoch),
                "scale_lr_by_batch": False,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.2,
                "clip_norm": 1.0 if mode == "full" else 0.0,
                "decay": [
                    ("temp", 0.0),
                    ("text_encoder/.*", 0.0),
                    (".*/(bias|scale|gamma)", 0.0),
                    ("vision_encoder/(cls_token|pos_embed)", 0.0),
                ],
                "freeze": frozen,
                "open": opened,
            },
            "seed": 42,
            "mesh": {"data": -1, "fsdp": fsdp},
            "checkpoint": {"every": epoch},
            "log_every": 10,
        }
    )
