"""Stage 2 of InternVideo2-1B: video and images aligned with text by contrast, matching and words.

    iv2 train --config configs/stage2/internvideo2_1b.py --workdir gs://BUCKET/s2_1b \
        --config.init="[{'tower': 'vision', 'path': 'gs://BUCKET/s1_1b'},
                        {'tower': 'text', 'path': 'bert-large-uncased'}]"

Recipe: spec stage2 8.2 (batch 4096, 10 epochs, one of them warm-up, 4 frames, 80 % of a video's and
50 % of an image's patches hidden). The lists are the original's; give each as an annotation JSON.
`loss.feature_gradient=0.015625` gives the released gradient of the contrast (trap 11.4), 1/64.
The mesh is for 64 chips, 64 clips a chip. None of this has been run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.models import zoo

BATCH = 4096
STEPS_PER_EPOCH = 25_500_000 // BATCH  # of "IV-25.5M"
IMAGES = ("cc3m", "cc12m", "coco", "vg", "sbu")
VIDEOS = ("webvid_10m",)


def get_config(arg: str = "") -> ConfigDict:
    model = config_lib.to_dict(zoo.get("internvideo2_stage2_1b"))
    bfloat16 = {"compute_dtype": "bfloat16"}
    model["vision"]["encoder"] |= {
        "drop_path_rate": 0.25,
        "remat": "named",
        "precision": bfloat16,
    }
    model["text"] |= {"remat": "dots", "precision": bfloat16}
    text = {"tokenizer": "bert", "path": "bert-large-uncased/vocab.txt", "max_length": 32}
    pictures = {
        "size": 224,
        "num_frames": 4,
        "sampling": "rand",
        "augment": "random_resized_crop",
        "text": text | {"min_words": 2},
    }
    lists = {"image": IMAGES, "video": VIDEOS}
    return ConfigDict(
        {
            "stage": "align",
            "steps": 10 * STEPS_PER_EPOCH,
            "batch_size": BATCH,
            "stage2": model,
            "data": {
                "media": {
                    media: pictures
                    | {
                        "media": media,
                        "corpora": [{"source": f"{name}.json"} for name in names],
                    }
                    for media, names in lists.items()
                },
            },
            "eval_data": {
                "source": "msrvtt_1k_test.json",
                "media": "video",
                "size": 224,
                "num_frames": 4,
                "sampling": "middle",
                "augment": "stretch",
                "eval": True,
                "text": text,
            },
            "loss": {"weights": {"vtc": 1.0, "vtm": 1.0, "mlm": 1.0}},
            "optimizer": {
                "schedule": "floored",
                "lr": 5e-5,
                "min_lr": 5e-7,
                "warmup_steps": STEPS_PER_EPOCH,
                "scale_lr_by_batch": False,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 3.0,
            },
            "retrieval": {"rerank_top": 128, "batch_size": 512},
            "mesh": {"data": 4, "fsdp": 16},
            "checkpoint": {"every": 1000},
            "eval_every": 2000,
            "log_every": 10,
        }
    )
