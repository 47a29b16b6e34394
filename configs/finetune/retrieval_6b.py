"""Fine-tuning InternVideo2-6B for text-video retrieval: `:msrvtt` or `:didemo`.

    iv2 train --config configs/finetune/retrieval_6b.py:msrvtt --workdir gs://BUCKET/ft_msrvtt \
        --config.init="[{'tower': 'model', 'path': 'gs://BUCKET/s2_6b'}]"

Recipe: spec stage2 8.2 (5 epochs, one of them warm-up, contrast and matching only, learning rate
5e-6). The released configs go on hiding patches (trap 11.11); here all are seen;
`--config.video_mask.kind=random` hides them. DiDeMo joins a video's captions to a paragraph and
takes the first 30 seconds. The mesh is for 32 chips. None of this has been run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.models import zoo

# Training clips and words of each set.
SETS = {"msrvtt": (180_000, 40), "didemo": (8_395, 64)}


def get_config(arg: str = "msrvtt") -> ConfigDict:
    clips, words = SETS[arg]
    paragraphs = arg == "didemo"
    batch = 32
    model = config_lib.to_dict(zoo.get("internvideo2_stage2_6b"))
    bfloat16 = {"compute_dtype": "bfloat16"}
    model["vision"]["encoder"] |= {"drop_path_rate": 0.3, "remat": "full", "precision": bfloat16}
    model["text"] |= {"remat": "full", "precision": bfloat16, "mlm_head": False}
    # No term uses sound, so no audio modules are built, as in the original.
    model |= {"audio": None, "av_fusion": False, "av_matching": False}
    data = {
        "media": "video",
        "corpora": [{"source": f"{arg}_ret_train.json", "seconds": 30.0 if paragraphs else None}],
        "size": 224,
        "num_frames": 4,
        "sampling": "rand",
        "augment": "random_resized_crop",
        "match": "path",  # captions of one video are not each other's negatives
        "text": {
            "tokenizer": "bert",
            "path": "bert-large-uncased/vocab.txt",
            "max_length": words,
            "choice": "join" if paragraphs else "random",
        },
    }
    test = data | {"sampling": "middle", "augment": "stretch", "eval": True}
    test["corpora"] = [data["corpora"][0] | {"source": f"{arg}_ret_test.json"}]
    return ConfigDict(
        {
            "stage": "align",
            "steps": 5 * (clips // batch),
            "batch_size": batch,
            "stage2": model,
            "data": {"media": {"video": data}},
            "eval_data": test,
            "loss": {"weights": {"vtc": 1.0, "vtm": 1.0}, "group_size": 8},
            "video_mask": {"kind": "none"},
            "optimizer": {
                "schedule": "floored",
                "lr": 5e-6,
                "min_lr": 5e-8,
                "warmup_steps": clips // batch,
                "scale_lr_by_batch": False,
                "b2": 0.98,
                "eps": 1e-8,
                "weight_decay": 0.05,
                "clip_norm": 3.0,
            },
            "retrieval": {"rerank_top": 128},
            "mesh": {"data": 1, "fsdp": 32},
            "checkpoint": {"every": 500},
            "eval_every": clips // batch,
        }
    )
