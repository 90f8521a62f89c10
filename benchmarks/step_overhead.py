"""What a multi-objective step costs over plain training: time ratio and peak memory, all contestants in one run.

A Llama-like model of 8.4 M parameters, K separate DPO mini-batches, AdamW. Contestants:

- plain: K backwards into `p.grad`, AdamW. No balancing at all: the floor.
- mogeo: `MultiObjectiveOptimizer`, the losses as callables; `mogeo uniform` is its constant-weight path.
- torchjd idiomatic: K forwards, `backward(losses)`, `jac_to_grad` with MGDA.
- torchjd best effort: one `jac` per loss as soon as its forward is done, so that one graph is alive at a time, then
  `jac_to_grad`.

Every round runs one step of each contestant in rotating order, so that noise of the machine falls on all; a ratio is
taken within a round, and the table gives its median and quartiles over rounds. Memory is the peak resident size of a
fresh process per contestant (Linux).

Run: python benchmarks/step_overhead.py [--tokens 256 2048] [--rounds 15] [--objectives 4] [--json PATH]
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from machine import describe
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer

CONTESTANTS = ("plain", "mogeo", "mogeo uniform", "mogeo group-dro", "torchjd idiomatic", "torchjd best effort")


def make_model() -> nn.Module:
    """A Llama-like decoder with 8.4 M parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=8,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(config)


def make_batches(objectives: int, tokens: int) -> list[Tensor]:
    """Per objective [sequences, length] token ids, `tokens` in all; the first half of the sequences is preferred."""
    length = 64
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(4096, (tokens // length, length), generator=generator) for _ in range(objectives)]


def dpo_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """The DPO loss against a reference that assigns every response the same log-probability."""
    logits = model(batch).logits[:, :-1]
    log_probs = F.log_softmax(logits, -1).gather(2, batch[:, 1:, None]).squeeze(2).sum(1)
    chosen, rejected = log_probs.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def steps_of(contestant: str, model: nn.Module, batches: list[Tensor]) -> Callable[[], None]:
    """One training step of a contestant, as a function."""
    base = torch.optim.AdamW(model.parameters(), lr=1e-6)
    losses = [lambda batch=batch: dpo_loss(model, batch) for batch in batches]

    if contestant == "plain":

        def step() -> None:
            base.zero_grad()
            for loss in losses:
                loss().backward()
            base.step()

    elif contestant.startswith("mogeo"):
        weighting = contestant.removeprefix("mogeo").strip() or "mgda-decoupled"
        optimizer = MultiObjectiveOptimizer(base, weighting)

        def step() -> None:
            optimizer.zero_grad()
            optimizer.backward(losses)
            optimizer.step()

    elif contestant == "torchjd idiomatic":
        from torchjd.aggregation import MGDA
        from torchjd.autojac import backward, jac_to_grad

        aggregator = MGDA()

        def step() -> None:
            base.zero_grad()
            backward([loss() for loss in losses])
            jac_to_grad(model.parameters(), aggregator)
            base.step()

    else:
        from torchjd.aggregation import MGDA
        from torchjd.autojac import jac, jac_to_grad

        aggregator = MGDA()
        parameters = list(model.parameters())

        def step() -> None:
            base.zero_grad()
            rows = [jac([loss()], inputs=parameters) for loss in losses]
            for parameter, *jacobians in zip(parameters, *rows, strict=True):
                parameter.jac = torch.cat(jacobians)
            del rows
            jac_to_grad(parameters, aggregator, optimize_gramian_computation=True)
            base.step()

    return step


def rounds_of(steps: dict[str, Callable[[], None]], rounds: int) -> Iterator[dict[str, float]]:
    """Seconds per contestant, round by round, the order rotating."""
    names = list(steps)
    for index in range(-2, rounds):
        seconds = {}
        for name in names[index % len(names) :] + names[: index % len(names)]:
            start = time.perf_counter()
            steps[name]()
            seconds[name] = time.perf_counter() - start
        if index >= 0:  # two rounds warm up
            yield seconds


def high_water_mark() -> float:
    """Peak resident MiB of this process. getrusage would count the parent's, which a child inherits."""
    with open("/proc/self/status") as status:
        return float(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def peak_memory(contestant: str, tokens: int, objectives: int, threads: int) -> float:
    """Peak resident MiB of a fresh process that takes three steps."""
    command = [
        sys.executable,
        __file__,
        "--memory-of",
        contestant,
        "--tokens",
        str(tokens),
        "--objectives",
        str(objectives),
    ]
    result = subprocess.run([*command, "--threads", str(threads)], capture_output=True, text=True, check=True)
    return float(result.stdout.split()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[256, 2048], help="tokens per objective (default 256 2048)"
    )
    parser.add_argument("--objectives", type=int, default=4, help="K (default 4)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per setting (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: torch's)")
    parser.add_argument("--only", nargs="+", default=list(CONTESTANTS), choices=CONTESTANTS)
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.memory_of:
        step = steps_of(arguments.memory_of, make_model(), make_batches(arguments.objectives, arguments.tokens[0]))
        for _ in range(3):
            step()
        print(high_water_mark())
        return

    facts = describe("mogeo", "torchjd", "transformers")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    model = make_model()
    size = sum(p.numel() for p in model.parameters())
    print(f"{size / 1e6:.2f} M parameters, K = {arguments.objectives}, {arguments.rounds} rounds")
    results = []
    for tokens in arguments.tokens:
        batches = make_batches(arguments.objectives, tokens)
        steps = {name: steps_of(name, copy.deepcopy(model), batches) for name in ["plain", *arguments.only]}
        records = list(rounds_of(steps, arguments.rounds))
        print(f"\n{tokens} tokens an objective      ms a step     ratio to plain (quartiles)   peak RSS MiB")
        for name in steps:
            ratios = sorted(record[name] / record["plain"] for record in records)
            low, middle, high = statistics.quantiles(ratios, n=4)
            milliseconds = 1e3 * statistics.median(record[name] for record in records)
            memory = peak_memory(name, tokens, arguments.objectives, arguments.threads)
            print(f"  {name:24s} {milliseconds:9.1f}     {middle:6.3f}  ({low:.3f} … {high:.3f})   {memory:12.0f}")
            results.append(
                {
                    "contestant": name,
                    "tokens": tokens,
                    "ms": milliseconds,
                    "ratio": [low, middle, high],
                    "rss_mib": memory,
                }
            )
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": facts, "objectives": arguments.objectives, "results": results}, file, indent=1)


if __name__ == "__main__":
    main()
