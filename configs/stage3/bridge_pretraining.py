"""The Q-Former before the language model: contrast, matching and captioning, encoder frozen.

    iv2 train --config configs/stage3/bridge_pretraining.py --workdir gs://BUCKET/s3_bridge \
        --config.init.0.path=gs://BUCKET/s2_1b --config.init.1.path=bert-base-uncased \
        --config.data.media.video.prefix=/data/webvid

Chats start from it with {'tower': 'bridge', 'path': 'gs://BUCKET/s3_bridge'}. Recipe: spec stage3
8.2 (UMT-L's lineage, stage 1; that of InternVideo2's own Q-Former is not published) and 8.3:
WebVid-10M and CC14M, 4 frames, 128 rows a device, rate 1e-4 with a floor of a hundredth, 10 epochs,
0.2 of one warm-up, decay 0.02, no clipping. Ours, as nobody told: 32 devices, so a batch of 4096;
captions of 32 ids. In front is InternVideo2-1B; the time embedding that UMT-L's run added before
the Q-Former is left out, as the encoder's positions have time. The mesh is for 32 chips. None of
this has been run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.models import zoo

DEVICES, ROWS = 32, 128
CLIPS = 24_700_000  # of WebVid-10M, CC3M and CC12M (together CC14M)
EPOCHS, WARMUP = 10, 0.2


def _model() -> dict:
    """Chat-8B's encoder and Q-Former, without the queries added for instruction tuning."""
    chat = config_lib.to_dict(zoo.get("internvideo2_chat_8b"))
    bfloat16 = {"precision": {"compute_dtype": "bfloat16"}}
    frozen = {"precision": {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"}}
    return {
        "encoder": chat["encoder"] | {"num_frames": 4} | frozen,
        "bridge": chat["bridge"] | {"num_extra_queries": 0, "remat": "dots"} | bfloat16,
        "joint_width": 768,
        "temp_init": 0.07,
    }


def get_config() -> ConfigDict:
    batch = DEVICES * ROWS
    epoch = CLIPS // batch
    data = {
        "size": 224,
        "augment": "random_resized_crop",
        "text": {
            "path": "bert-base-uncased/vocab.txt",
            "max_length": 32,
            "options": {"trailing_sep": True, "extra_tokens": ["[DEC]"]},
        },
    }
    return ConfigDict(
        {
            "stage": "bridge",
            "steps": EPOCHS * epoch,
            "batch_size": batch,
            "bridge_pretraining": _model(),
            "init": [
                {"tower": "vision", "path": "InternVideo2-stage2_1b-224p-f4.pt"},
                {"tower": "bridge", "path": "bert-base-uncased"},
            ],
            "loss": {
                "weights": {"vtc": 1.0, "vtm": 1.0, "cap": 1.0},
                "group_size": ROWS,
            },
            "data": {
                "media": {
                    "image": {
                        **data,
                        "media": "image",
                        "corpora": [{"source": f"{name}.json"} for name in ("cc3m", "cc12m")],
                    },
                    "video": {
                        **data,
                        "media": "video",
                        "source": "webvid_10m.json",
                        "num_frames": 4,
                        "sampling": "middle",  # in training one at random of each quarter
                    },
                }
            },
            "optimizer": {
                "lr": 1e-4,
                "min_lr": 1e-6,
                "schedule": "floored",
                "warmup_steps": round(WARMUP * epoch),
                "scale_lr_by_batch": False,
                "b2": 0.999,
                "eps": 1e-8,
                "weight_decay": 0.02,
                "clip_norm": 0.0,
                # Nothing with one axis decays; a stack's leading axis counts as none.
                "decay": [[".*/(bias|scale)", 0.0], ["temp", 0.0]],
                "freeze": ["encoder/.*"],
            },
            "mesh": {"data": -1, "fsdp": 8},
            "checkpoint": {"every": epoch},
            "log_every": 10,
        }
    )
