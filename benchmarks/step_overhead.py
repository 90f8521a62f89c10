"""What a multi-objective step costs over plain training: time ratio and peak memory, all contestants in one run.

K separate DPO mini-batches and AdamW on a model with random weights: on a CPU a Llama-like one of 8.4 M parameters in
fp32; on a GPU one of the shape of Qwen2.5-0.5B, bf16 autocast over fp32 weights or bf16 weights, fused AdamW.
Contestants:

- plain: K backwards into `p.grad`, AdamW. No balancing at all: the floor.
- mogeo: `MultiObjectiveOptimizer`, the losses as callables; `mogeo uniform` is its constant-weight path.
- torchjd idiomatic: K forwards, `backward(losses)`, `jac_to_grad` with MGDA.
- torchjd best effort: one `jac` per loss as soon as its forward is done, so that one graph is alive at a time, then
  `jac_to_grad`.

Every round runs one step of each contestant in rotating order, so that noise of the machine falls on all; a ratio is
taken within a round, and the table gives its median and quartiles over rounds. Where the contestants do not fit into
the GPU's memory side by side, or with --alternate, blocks take the place of rounds: in each block every contestant in
turn has the memory to itself, warms up and takes a few steps, and the ratio is that of their medians. Memory is the
peak over three steps: of the resident size (Linux) of a fresh process per contestant, or on a GPU of what torch has
allocated there, over what it had before.

`--model small-tensors` is another case: 1,000 tensors of 4 elements, K = 2, 4, 8, which benchmarks/small_tensors.py
describes.

A contestant that fails is written down, and the others go on; the exit code is 1 if it was one of mogeo's. No setting
starts after the seconds of --budget. Figures are written after each setting.

Run: python benchmarks/step_overhead.py [--device cuda] [--tokens 256 2048] [--rounds 15] [--budget SECONDS]
     [--threads 1 --clock cpu] [--json PATH]
     python benchmarks/step_overhead.py --model small-tensors [--objectives 4] [--rounds 15] [--json PATH]
"""

from __future__ import annotations

import argparse
import copy
import gc
import importlib.util
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import small_tensors
import torch
import torch.nn.functional as F
from machine import clocks, describe, free_bytes
from timing import Clock, cpu_clock, first_line, rotated, rounds_of, spread, wall_clock
from torch import Tensor, nn

from mogeo import MultiObjectiveOptimizer

CONTESTANTS = ("plain", "mogeo", "mogeo uniform", "mogeo group-dro", "torchjd idiomatic", "torchjd best effort")
SMALL_TENSORS = "small-tensors"  # a case of its own among the models
WARM_UP = 2
STEPS_OF_A_BLOCK = 3


class Shape(NamedTuple):
    """A model, and how it is trained."""

    config: dict[str, Any]  #: of a Llama, or of a Qwen2
    length: int  #: tokens of a sequence
    tokens: tuple[int, ...]  #: per objective, by default
    mixed: bool  #: bf16 autocast over fp32 weights, fused AdamW
    contestants: tuple[str, ...]  #: by default


_SHORT = ("plain", "mogeo", "mogeo uniform", "torchjd best effort")
MODELS = {
    "llama-8m": Shape(
        {
            "vocab_size": 4096,
            "hidden_size": 256,
            "intermediate_size": 688,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "tie_word_embeddings": False,
        },
        length=64,
        tokens=(256, 2048),
        mixed=False,
        contestants=CONTESTANTS,
    ),
    # Qwen2.5-0.5B, numbers from its published config.json
    "qwen-0.5b": Shape(
        {
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_cache": False,
        },
        length=512,
        tokens=(1024, 4096),
        mixed=True,
        contestants=_SHORT,
    ),
    "qwen-shape-tiny": Shape(
        {
            "vocab_size": 512,
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "use_cache": False,
        },
        length=64,
        tokens=(128,),
        mixed=True,
        contestants=_SHORT,
    ),
}


class Setting(NamedTuple):
    """What all contestants train, and where."""

    model: str
    device: torch.device
    weights: str  #: "fp32" or "bf16"
    objectives: int
    tokens: int

    @property
    def shape(self) -> Shape:
        """Of the model."""
        return MODELS[self.model]

    @property
    def autocast(self) -> bool:
        """Whether forwards run under bf16 autocast."""
        return self.shape.mixed and self.weights == "fp32"


def make_model(setting: Setting) -> nn.Module:
    """On the CPU, random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    config = setting.shape.config
    model: nn.Module = (
        LlamaForCausalLM(LlamaConfig(**config))
        if setting.model.startswith("llama")
        else Qwen2ForCausalLM(Qwen2Config(**config))
    )
    return model.to(torch.bfloat16 if setting.weights == "bf16" else torch.float32)


def make_batches(setting: Setting) -> list[Tensor]:
    """Per objective [sequences, length] token ids, `tokens` in all; the first half of the sequences is preferred."""
    generator = torch.Generator().manual_seed(0)
    size = (setting.tokens // setting.shape.length, setting.shape.length)
    vocabulary = setting.shape.config["vocab_size"]
    return [torch.randint(vocabulary, size, generator=generator).to(setting.device) for _ in range(setting.objectives)]


def dpo_loss(model: nn.Module, batch: Tensor, autocast: bool) -> Tensor:
    """The DPO loss against a reference that assigns every response the same log-probability."""
    with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
        logits = model(batch).logits[:, :-1]
    log_probs = F.log_softmax(logits.float(), -1).gather(2, batch[:, 1:, None]).squeeze(2).sum(1)
    chosen, rejected = log_probs.chunk(2)
    return -F.logsigmoid(0.1 * (chosen - rejected)).mean()


def prepared(model: nn.Module, setting: Setting) -> tuple[torch.optim.Optimizer, list[Callable[[], Tensor]]]:
    """AdamW over the model, which moves to the device, and the objectives' losses as callables."""
    model = model.to(setting.device)
    base = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True if setting.shape.mixed else None)
    return base, [lambda batch=batch: dpo_loss(model, batch, setting.autocast) for batch in make_batches(setting)]


def steps_of(contestant: str, model: nn.Module, setting: Setting) -> Callable[[], None]:
    """One training step of a contestant, as a function."""
    base, losses = prepared(model, setting)

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


def high_water_mark() -> float:
    """Peak resident MiB of this process."""
    # getrusage would count the parent's, which a child inherits.
    with open("/proc/self/status") as status:
        return float(next(line.split()[1] for line in status if line.startswith("VmHWM"))) / 1024


def print_memory(contestant: str, setting: Setting) -> None:
    """What the fresh process does: three steps, then peak MiB."""
    step = steps_of(contestant, make_model(setting), setting)
    for _ in range(3):
        step()
    print(high_water_mark())


def memory_on_gpu(contestant: str, model: nn.Module, setting: Setting) -> tuple[float, float]:
    """Peak MiB, and MiB held between steps, of a contestant: what torch gave out beyond what others hold."""
    release(setting.device)
    before = torch.cuda.memory_allocated(setting.device)
    step = steps_of(contestant, copy.deepcopy(model), setting)
    torch.cuda.reset_peak_memory_stats(setting.device)
    for _ in range(3):
        step()
    torch.cuda.synchronize(setting.device)
    held = torch.cuda.memory_allocated(setting.device) - before
    return (torch.cuda.max_memory_allocated(setting.device) - before) / 2**20, held / 2**20


def memory_of(contestant: str, model: nn.Module, setting: Setting) -> tuple[float, float] | None:
    """Peak MiB, and MiB held between steps on a GPU, of a contestant alone; None if the GPU's do not do."""
    if setting.device.type == "cuda":
        try:
            return memory_on_gpu(contestant, model, setting)
        except torch.OutOfMemoryError:
            return None
        finally:
            release(setting.device)
    command = [sys.executable, __file__, "--memory-of", contestant, "--threads", str(torch.get_num_threads())]
    for option in ("model", "device", "weights", "objectives", "tokens"):
        command += [f"--{option}", str(getattr(setting, option))]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{contestant} took no steps in a process of its own:\n{result.stderr[-2000:]}")
    return float(result.stdout.split()[-1]), 0.0


def fit_side_by_side(memory: dict[str, tuple[float, float]], device: torch.device) -> bool:
    """Whether all contestants can hold what they hold, and one at a time take its peak, with a tenth to spare."""
    if device.type != "cuda":
        return True
    needed = sum(held for _, held in memory.values()) + max(peak - held for peak, held in memory.values())
    return needed < 0.9 * free_bytes(device) / 2**20


def blocks_of(
    names: list[str], model: nn.Module, setting: Setting, rounds: int, clock: Clock
) -> Iterator[dict[str, float]]:
    """Median seconds a step of each contestant, block by block: one at a time in memory, in rotating order."""
    for block in range(max(2, rounds // STEPS_OF_A_BLOCK)):
        medians = {}
        for name in rotated(names, block):
            step = steps_of(name, copy.deepcopy(model), setting)
            steps = [seconds[name] for seconds in rounds_of({name: step}, STEPS_OF_A_BLOCK, clock, WARM_UP)]
            medians[name] = statistics.median(steps)
            del step
            release(setting.device)
        yield medians


def release(device: torch.device) -> None:
    """Give back what no one holds any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(
    names: list[str],
    setting: Setting,
    rounds: int,
    alternate: bool,
    clock: Clock,
    left_out: dict[str, str],
    failed: dict[str, str],
) -> list[dict[str, Any]]:
    """Print a table of all contestants for one setting; its figures."""
    model = make_model(setting).to(setting.device)
    memory: dict[str, tuple[float, float]] = {}
    for name in names:
        what = f"{name}, {setting.tokens} tokens"
        try:
            alone = memory_of(name, model, setting)
        except Exception as error:  # whatever it is, the others go on
            failed[what] = first_line(error)
            print(f"failed: {what}: {error}")
            continue
        if alone is None:
            left_out[what] = "does not fit into the GPU's memory"
            print(f"left out: {what}: {left_out[what]}")
        else:
            memory[name] = alone
    names = list(memory)
    if "plain" not in names:
        return []
    if alternate or not fit_side_by_side(memory, setting.device):
        design = "alternating blocks"
        records = list(blocks_of(names, model, setting, rounds, clock))
    else:
        design = "side by side"
        steps = {name: steps_of(name, copy.deepcopy(model), setting) for name in names}
        records = list(rounds_of(steps, rounds, clock, WARM_UP))
        del steps
        release(setting.device)
    kind = "device" if setting.device.type == "cuda" else "RSS"
    print(f"\n{design}, {len(records)} {'rounds' if design == 'side by side' else 'blocks'}")
    print(f"{setting.tokens} tokens an objective      ms a step     ratio to plain (quartiles)   peak {kind} MiB")
    results = []
    for name in names:
        low, middle, high = statistics.quantiles((record[name] / record["plain"] for record in records), n=4)
        ms = spread([1e3 * record[name] for record in records])
        peak, _ = memory[name]
        print(f"  {name:24s} {ms['p50']:9.1f}     {middle:6.3f}  ({low:.3f} … {high:.3f})   {peak:12.0f}")
        results.append(
            {"contestant": name, "tokens": setting.tokens, "design": design, "ms": ms, "ratio": [low, middle, high]}
            | {"peak_mib": peak, "memory": kind}
        )
    return results


def parse() -> argparse.Namespace:
    """The options, defaults by device and model filled in."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="default: cpu")
    parser.add_argument("--model", choices=[*MODELS, SMALL_TENSORS], help="default: llama-8m, on a GPU qwen-0.5b")
    parser.add_argument(
        "--weights",
        default="fp32",
        choices=["fp32", "bf16"],
        help="fp32 (a Qwen's: with bf16 autocast) or bf16",
    )
    parser.add_argument(
        "--tokens", type=int, nargs="+", help="tokens per objective (default 256 2048, of qwen-0.5b 1024 4096)"
    )
    parser.add_argument("--objectives", type=int, help="K (default 4; of small-tensors 2, 4 and 8)")
    parser.add_argument("--rounds", type=int, default=15, help="timed rounds per setting (default 15)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch threads (default: torch's)")
    parser.add_argument(
        "--clock", default="wall", choices=["wall", "cpu"], help="cpu: seconds of CPU, for a machine that is busy"
    )
    parser.add_argument("--only", nargs="+", choices=CONTESTANTS, help="default: all that suit the model")
    parser.add_argument("--alternate", action="store_true", help="one contestant at a time in memory")
    parser.add_argument("--budget", type=float, default=math.inf, metavar="SECONDS", help="start nothing after that")
    parser.add_argument("--json", help="also write the figures here")
    parser.add_argument("--memory-of", choices=CONTESTANTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    arguments.model = arguments.model or ("qwen-0.5b" if arguments.device.type == "cuda" else "llama-8m")
    if arguments.clock == "cpu" and arguments.device.type == "cuda":
        parser.error("--clock cpu: a GPU's work takes no seconds of CPU")
    if arguments.model == SMALL_TENSORS:
        return arguments
    arguments.objectives = arguments.objectives or 4
    arguments.tokens = arguments.tokens or list(MODELS[arguments.model].tokens)
    for tokens in arguments.tokens:
        if tokens <= 0 or tokens % (2 * MODELS[arguments.model].length):
            parser.error(f"--tokens {tokens}: pass a multiple of {2 * MODELS[arguments.model].length}, whole pairs")
    return arguments


def measure_small_tensors(arguments: argparse.Namespace, end: float) -> None:
    """The case of its own: print, and write the figures after each setting."""
    torch.set_num_threads(1)
    facts = describe("mogeo")
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    document: dict[str, Any] = {"machine": facts, "model": SMALL_TENSORS, "rounds": arguments.rounds, "results": []}
    document["left_out"] = {}
    for objectives in [arguments.objectives] if arguments.objectives else (2, 4, 8):
        if time.monotonic() > end:
            document["left_out"][f"K = {objectives}"] = "no time left (--budget)"
            print(f"left out: K = {objectives}: no time left (--budget)")
            continue
        for record in small_tensors.measure(objectives, arguments.rounds):
            document["results"].append(record)
            if arguments.json:
                with open(arguments.json, "w") as file:
                    json.dump(document, file, indent=1)


def main() -> None:
    """Parse, measure, print; write the figures after each setting."""
    arguments = parse()
    end = time.monotonic() + arguments.budget
    if arguments.model == SMALL_TENSORS:
        measure_small_tensors(arguments, end)
        return
    torch.set_num_threads(arguments.threads)
    settings = [
        Setting(arguments.model, arguments.device, arguments.weights, arguments.objectives, tokens)
        for tokens in arguments.tokens
    ]
    if arguments.memory_of:
        print_memory(arguments.memory_of, settings[0])
        return

    facts = describe("triton", "mogeo", "torchjd", "transformers", device=arguments.device)
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    names = list(dict.fromkeys(["plain", *(arguments.only or settings[0].shape.contestants)]))
    left_out: dict[str, str] = {}
    failed: dict[str, str] = {}
    if importlib.util.find_spec("torchjd") is None:
        for name in [name for name in names if name.startswith("torchjd")]:
            names.remove(name)
            left_out[name] = "TorchJD is not installed"
            print(f"left out: {name}: {left_out[name]}")
    n_parameters = sum(p.numel() for p in make_model(settings[0]).parameters())
    precision = "bf16 autocast over fp32 weights" if settings[0].autocast else f"{arguments.weights} weights"
    print(f"{arguments.model}: {n_parameters / 1e6:.2f} M parameters, {precision}, K = {arguments.objectives}")
    document: dict[str, Any] = {"machine": facts, "model": arguments.model, "parameters": n_parameters}
    document |= {"precision": precision, "objectives": arguments.objectives, "rounds": arguments.rounds, "results": []}
    document |= {"clock": arguments.clock, "left_out": left_out, "failed": failed}
    for setting in settings:
        if time.monotonic() > end:
            left_out[f"{setting.tokens} tokens"] = "no time left (--budget)"
            print(f"left out: {setting.tokens} tokens: no time left (--budget)")
        else:
            try:
                clock = cpu_clock if arguments.clock == "cpu" else wall_clock(arguments.device)
                document["results"] += measure(
                    names, setting, arguments.rounds, arguments.alternate, clock, left_out, failed
                )
            except Exception as error:
                failed[f"mogeo or others, {setting.tokens} tokens, side by side"] = first_line(error)
                print(f"failed: {setting.tokens} tokens: {error}")
                release(arguments.device)
        if arguments.json:
            document["clocks_last"] = clocks(arguments.device)
            with open(arguments.json, "w") as file:
                json.dump(document, file, indent=1)
    if any(name.startswith("mogeo") for name in failed):
        sys.exit(1)


if __name__ == "__main__":
    main()
