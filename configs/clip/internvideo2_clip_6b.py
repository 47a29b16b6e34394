"""InternVideo2-CLIP 6B: the attentive pool tuned over the stage-2 encoder and InternVL-C's text.

    iv2 train --config configs/clip/internvideo2_clip_6b.py --workdir gs://BUCKET/clip_6b \
        --config.init.0.path=InternVideo2-Stage2_6B \
        --config.init.1.path=internvl_c_13b_224px.pth \
        --config.data.media.video.prefix=/data/webvid

Recipe: spec stage2 7.4 (data_25m: webvid_10m, cc3m, coco, vg, sbu, cc12m; batch 2048, 1 epoch, 0.2
of it warm-up). 33,207,169 parameters are trained: the pool and the temperature. `:full` trains
everything, `:lora` adapters in the text tower beside the pool; their rates are ours, nothing of
them is published. The released run scaled the gradient through the features by 1/16
(`loss.feature_gradient`) and left the frozen towers' DropPath on (`frozen_towers_in_train_mode`);
both are off here. The mesh is for 64 chips. None of this has been run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.errors import ConfigError, nearest
from iv2_jax.models import zoo
from iv2_jax.models.text.llama_clip import LORA, LORA_TARGETS

BATCH_SIZE = 16 * 128
EPOCHS, WARMUP = 1, 0.2
STEPS_PER_EPOCH = 25_000_000 // BATCH_SIZE
MODES = ("pool", "lora", "full")


def get_config(arg: str = "pool") -> ConfigDict:
    if arg not in MODES:
        raise ConfigError(f"internvideo2_clip_6b.py:{arg}: unknown mode{nearest(arg, MODES)}")
    model = zoo.get("internvideo2_clip_6b")
    clip = config_lib.to_dict(model)
    clip["vision"]["precision"] = {"compute_dtype": "bfloat16"}
    clip["text"]["decoder"]["precision"] = {
        # What is never updated loses nothing by being kept as it was released.
        "param_dtype": "float32" if arg == "full" else "bfloat16",
        "compute_dtype": "bfloat16",
    }
    frozen = ["vision_encoder/.*", "text_encoder/.*"]
    opened = ["vision_encoder/pool/.*"]
    if arg == "full":
        frozen = opened = []
        clip["vision"]["remat"] = clip["text"]["decoder"]["remat"] = "dots"
    if arg == "lora":
        opened.append("text_encoder/.*/lora_[ab]")
        clip["text"]["decoder"] |= {
            "lora": config_lib.to_dict(LORA),
            "lora_targets": LORA_TARGETS,
            "remat": "dots",
        }
    steps = EPOCHS * STEPS_PER_EPOCH
    text = {"tokenizer": "llama_clip", "path": "tokenizer.model", "max_length": 80, "min_words": 2}
    data = {"size": 224, "augment": "random_resized_crop", "text": text}
    return ConfigDict(
        {
            "stage": "clip",
            "steps": steps,
            "batch_size": BATCH_SIZE,
            "clip": clip,
            "init": [
                {"tower": "vision", "path": "InternVideo2-Stage2_6B"},
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
                "lr": 1e-5 if arg == "full" else 4e-4,
                "min_lr": 1e-7 if arg == "full" else 4e-6,
                "schedule": "floored",
                "warmup_steps": round(WARMUP * STEPS_PER_EPOCH),
                "scale_lr_by_batch": False,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.2,
                "clip_norm": 1.0 if arg == "full" else 0.0,
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
            "mesh": {"data": -1, "fsdp": 32},
            "checkpoint": {"every": STEPS_PER_EPOCH},
            "log_every": 10,
        }
    )
