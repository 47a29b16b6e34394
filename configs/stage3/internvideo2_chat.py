"""Stage 3 of InternVideo2-Chat: `:[internlm,]bridge|caption|tuning|hd8|hd16`; else Mistral-7B.

    iv2 train --config configs/stage3/internvideo2_chat.py:tuning --workdir gs://BUCKET/s3_tuning \
        --config.mix=videochat2_it.yaml \
        --config.init="[{'tower': 'model', 'path': 'gs://BUCKET/s3_caption'}]"

`bridge` and `caption` start from parts: {'tower': 'vision', 'path': 'gs://BUCKET/s2_1b'},
{'tower': 'bridge', 'path': 'bert-base-uncased'} and {'tower': 'llm', 'path': 'mistral-7b-v0.3'}.
Recipe: spec stage3 8.1, 8.2 (STEP's scripts). The original's Q-Former comes from a pre-training of
its own, without a language model: `bridge_pretraining.py`, whose run `caption` takes as
{'tower': 'bridge', 'path': 'gs://BUCKET/s3_bridge'}. The variant `bridge` is another way to a first
Q-Former, all of it ours: captions through the frozen language model. Ours, as nobody told, are also
the number of samples of `hd16`, InternLM's `hd8`, and its template for captions. Every answer is
learnt, not one a visit as released (`--config.talk.sequence.compat=released_tuning`). Nothing is
mirrored (trap 21). The mesh is for 64 chips with memory enough to keep matrix products for the
backward pass (v5p); on smaller ones set `remat=full` of encoder and llm.decoder. None of
this has been run on hardware.
"""

from ml_collections import ConfigDict

from iv2_jax import config as config_lib
from iv2_jax.models import zoo

# Name -> frames, global batch, epochs, samples of an epoch, base rate, rate of the language model
# and of the encoder, warm-up share, longest row, micro-batches.
STAGES = {
    "bridge": (4, 2048, 1, 13_500_000, 1e-4, 0.0, 0.2, 512, 4),
    "caption": (4, 2048, 1, 13_500_000, 1e-4, 4e-5, 0.2, 512, 4),
    "tuning": (8, 256, 3, 1_900_000, 2e-5, 2e-5, 0.2, 1024, 1),
    "hd8": (8, 1024, 1, 2_100_000, 2e-5, 1e-5, 0.05, 1024, 8),
    "hd16": (16, 1024, 1, 2_100_000, 1e-5, 1e-5, 0.05, 1024, 8),
}
# What InternLM2.5's scripts have otherwise.
INTERNLM = {
    "caption": {"batch": 1024, "rate": 4e-5, "slow": 4e-5, "accumulate": 2},
    "tuning": {"batch": 512, "rate": 4e-5, "slow": 4e-5, "warmup": 0.03, "accumulate": 2},
    "hd16": {"warmup": 0.03},
}
FIELDS = ("frames", "batch", "epochs", "samples", "rate", "slow", "warmup", "length", "accumulate")


def _model(stage: str, internlm: bool, frames: int) -> dict:
    """The model: adapters from instruction tuning on, bfloat16 but for what is trained."""
    model = config_lib.to_dict(
        zoo.get("internvideo2_chat_8b" + ("_internlm2_5" if internlm else ""))
    )
    model["encoder"] |= {
        "num_frames": frames,
        "remat": "named",
        "precision": {"compute_dtype": "bfloat16"},
    }
    # "dots" here ends libtpu 0.0.42 in a segmentation fault.
    model["bridge"] |= {"remat": "full", "precision": {"compute_dtype": "bfloat16"}}
    model["llm"]["decoder"] |= {
        "remat": "dots",
        "precision": {"param_dtype": "bfloat16", "compute_dtype": "bfloat16"},
    }
    if stage in ("bridge", "caption"):
        model["llm"]["decoder"] |= {"lora": None, "lora_targets": []}
        model["llm"]["lora_head"] = False
    return model


def _talk(stage: str, internlm: bool, frames: int, length: int) -> dict:
    """Template, frames and tiles; the bridge is told the instruction from tuning on."""
    form = {"bridge": "_caption", "caption": "_caption", "tuning": "_tuning"}.get(stage, "")
    captions = form == "_caption"
    talk = {
        "tokenizer": "internlm2_5-7b-chat-1m" if internlm else "mistral-7b-instruct-v0.3",
        "sequence": {
            "template": "internlm2_5" if internlm else f"mistral_v3{form}",
            "max_length": length,
            "one_turn": captions,
        },
        "frames": frames,
        "augment": "random_resized_crop",
    }
    if not captions:
        talk |= {"bridge_text": "instruction", "bridge_tokenizer": "bert-base-uncased/vocab.txt"}
    if stage.startswith("hd"):
        talk["tiling"] = {"max_tiles": 6}
    return talk


def get_config(arg: str = "tuning") -> ConfigDict:
    words = arg.split(",")
    stage, internlm = words[-1], "internlm" in words
    recipe = dict(zip(FIELDS, STAGES[stage], strict=True))
    recipe |= INTERNLM.get(stage, {}) if internlm else {}
    frames, batch, length = recipe["frames"], recipe["batch"], recipe["length"]
    steps = recipe["epochs"] * recipe["samples"] // batch
    bridge_only = stage == "bridge"
    tuned = stage in ("tuning", "hd8", "hd16")
    slow = recipe["slow"] / recipe["rate"]
    rates = [["encoder/.*", slow]] + ([["llm/.*", slow]] if tuned else [])
    return ConfigDict(
        {
            "stage": "instruct",
            "steps": steps,
            "batch_size": batch,
            "chat": _model(stage, internlm, frames),
            "talk": _talk(stage, internlm, frames, length),
            # Rows of one conversation; with tiles, of up to seven views.
            "rows": {
                "lengths": [256, 512] if length == 512 else [256, 512, 1024],
                "views": [3, 5, 7] if stage.startswith("hd") else [1],
            },
            "load": {"num_workers": 16, "sizes": "", "measure_workers": 64},
            "accumulate": recipe["accumulate"],
            "optimizer": {
                "lr": recipe["rate"],
                "min_lr": 0.05 * recipe["rate"],
                "warmup_steps": round(recipe["warmup"] * steps),
                "scale_lr_by_batch": False,
                "b2": 0.999,
                "eps": 1e-5,
                "weight_decay": 0.02,
                "clip_norm": 1.0,
                # The original decays all but biases and LayerNorms: the encoder's RMSNorms,
                # LayerScale, positions and queries, too (spec stage3 8.2).
                "decay": [[".*/bias", 0.0], ["bridge/.*norm[^/]*/scale", 0.0]],
                "freeze": ["llm/.*", "bridge/project_down/.*"]
                + (["encoder/.*"] if bridge_only else []),
                "open": ["llm/.*/lora_[ab]"] if tuned else [],
                "lr_multipliers": [] if bridge_only else rates,
            },
            "mesh": {"data": 1, "fsdp": 64},
            "checkpoint": {"every": 500},
            "eval_every": 1000,
            "log_every": 10,
        }
    )
