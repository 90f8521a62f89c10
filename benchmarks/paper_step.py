"""One step of the paper's models with random weights: parameters, shapes, peak memory, and time, where it runs.

Builds Qwen2.5-0.5B-Instruct or Gemma-2-2b-it from its config alone (nothing is downloaded), and lets `mogeo align`'s
own loop take steps on made-up pairs of `--tokens` tokens: reference scores, K gradients, the solve, AdamW. `--layers`
builds fewer of the model's layers, where the whole does not fit; width, heads and vocabulary stay.

Beside the peak stands the sum of what has to be held: fp32 weights, two moments of AdamW, K gradient rows. What is
above it are activations, logits of a chunk, and Python with its libraries.

Run: python benchmarks/paper_step.py --model qwen2.5-0.5b [--objectives 4] [--pairs 1] [--tokens 256] [--layers N]
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from machine import describe

from mogeo.demo.world import tokenizer
from mogeo.dpo.config import AlignConfig
from mogeo.dpo.data import Pair, Preferences
from mogeo.dpo.train import align

# The values of the models' published config.json.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": {
        "kind": "Qwen2Config",
        "vocab_size": 151936,
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
    },
    "gemma-2-2b": {
        "kind": "Gemma2Config",
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
    },
    "tiny": {  # to see that this script runs
        "kind": "Gemma2Config",
        "vocab_size": 128,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 64,
    },
}


def build(name: str, layers: int | None, device: str) -> Any:
    """The model, random weights in fp32; on the device "meta" it has shapes only."""
    values = dict(CONFIGS[name])
    kind = getattr(transformers, values.pop("kind"))
    if layers is not None:
        values["num_hidden_layers"] = layers
    config = kind(**values, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with torch.device(device):
        return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")


def made_up(objectives: int, count: int, tokens: int) -> Preferences:
    """Pairs of `tokens` tokens each side, half of them the prompt's."""
    half = tokens // 2
    pairs = {}
    for k in range(objectives):
        words = ["Esk", "oats", "flint", "wren", "amber", "pottery"]
        pairs[f"objective {k}"] = [
            Pair(
                " ".join(words[(i + j) % 6] for j in range(half)),
                " ".join(words[(i + k + j) % 6] for j in range(half - 1)),
                " ".join(words[(i + k + 2 * j) % 6] for j in range(half - 1)),
            )
            for i in range(count)
        ]
    return Preferences(pairs, {})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=CONFIGS, required=True)
    parser.add_argument("--objectives", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=1, help="of each objective in a step")
    parser.add_argument("--tokens", type=int, default=256, help="of a sequence")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--weighting", default="mgda-decoupled")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    machine = describe("transformers")
    whole = sum(p.numel() for p in build(options.model, None, "meta").parameters())
    torch.manual_seed(0)
    model = build(options.model, options.layers, "cpu")
    count = sum(p.numel() for p in model.parameters())
    before = _peak()
    words: Any = tokenizer()
    words.model_max_length = options.tokens
    config = AlignConfig(
        weighting=options.weighting, max_steps=options.steps, warmup_steps=0, pairs_per_objective=options.pairs,
        eval_every=0, prompt_format="plain",
    )  # fmt: skip
    train = made_up(options.objectives, options.pairs * options.steps, options.tokens)
    held_out = made_up(options.objectives, 1, options.tokens)
    started = time.perf_counter()
    result = align(model, words, train, held_out, config, progress=False)
    steps = [record for record in result.history if record["kind"] == "train"]
    held = 4 * count * (1 + 2 + options.objectives)
    found = {
        "model": options.model,
        "layers": options.layers or CONFIGS[options.model]["num_hidden_layers"],
        "parameters of the whole model": whole,
        "parameters": count,
        "objectives": options.objectives,
        "sequences a step": 2 * options.objectives * options.pairs,
        "tokens a sequence": options.tokens,
        "weights, moments and rows, GB": held / 1e9,
        "peak before training, GB": before / 1e9,
        "peak, GB": _peak() / 1e9,
        "seconds, reference scores included": time.perf_counter() - started,
        "seconds a step": [round(record["seconds"], 2) for record in steps],
        "weights": steps[-1]["weight"],
        "alignment": steps[-1]["alignment"],
    }
    for key, value in {**machine, **found}.items():
        print(f"{key}: {value:,.2f}" if isinstance(value, float) else f"{key}: {value}")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "results": found}, indent=1) + "\n", "utf-8")


def _peak() -> int:
    """Peak resident memory of this process, bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    main()
