"""`mogeo plan` against what a step really takes: small models with random weights, on a CPU, three steps each, of which
the first and the last solve for weights.

Every case runs in processes of its own, and is measured twice over. `allocations`: the highest sum of what torch's
allocator has given out and not taken back, by torch.profiler, from before the model is built; the same on every run.
`resident`: how far the peak of resident memory (VmHWM) lies above what the imports left (VmRSS), with one malloc arena
and every block above 64 KiB mapped by itself, so that what is freed goes back; several runs, for it varies.

Modes that the installed optimizer does not know are left out, aloud.

Run: python benchmarks/plan_check.py [--quick] [--repeats 3] [--json PATH]
"""

from __future__ import annotations

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
import transformers
from machine import describe
from torch import Tensor

from mogeo import MultiObjectiveOptimizer
from mogeo.dpo.engines import make_engine
from mogeo.dpo.losses import dpo_loss
from mogeo.dpo.processes import current_processes, leave_process_group
from mogeo.plan.activations import outline, trace
from mogeo.plan.memory import Mode, Setup, memory, modes

# 30 to 60 million parameters: enough to dwarf what Python does meanwhile.
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen2": {
        "kind": "Qwen2Config", "vocab_size": 32000, "hidden_size": 512, "intermediate_size": 2048,
        "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2, "tie_word_embeddings": True,
    },
    "llama": {
        "kind": "LlamaConfig", "vocab_size": 16000, "hidden_size": 512, "intermediate_size": 1408,
        "num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8,
    },
    "gemma2": {
        "kind": "Gemma2Config", "vocab_size": 64000, "hidden_size": 384, "intermediate_size": 1536,
        "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 64,
    },
    "tiny": {
        "kind": "LlamaConfig", "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 256,
        "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 2,
    },
}  # fmt: skip

MIB = 2**20
_STEPS = 3


@dataclass(frozen=True)
class Case:
    """A step to be planned and measured."""

    model: str
    mode: str = "exact"
    precision: str = "fp32"
    checkpointing: bool = False
    engine: str = "none"
    optimizer: str = "adamw"
    objectives: int = 4
    sequences: int = 4
    tokens: int = 256

    @property
    def ranks(self) -> int:
        """Ranks."""
        return 1 if self.engine == "none" else 2


def cases(quick: bool) -> list[Case]:
    """What is measured: every mode; two of them on other models and with checkpointing; and the rest one by one."""
    # Rows on the host are left out: on a CPU they lie where they always do.
    names = ("uniform", "exact", "bf16 rows", "sketch", "sketch, refresh", "refresh")
    two = ("exact", "sketch")
    if quick:
        return [Case("tiny", mode) for mode in names]
    listed = [Case("qwen2", name) for name in names]
    listed += [Case(m, n, checkpointing=c) for m in ("llama", "gemma2") for c in (False, True) for n in two]
    listed += [Case("qwen2", name, checkpointing=True) for name in two]
    listed += [Case("qwen2", "exact", p, c) for p in ("autocast", "bf16") for c in (False, True)]
    listed += [Case("llama", "exact", optimizer=name) for name in ("sgd", "lion")]
    listed += [Case("qwen2", m, engine=e) for e in ("ddp", "ddp-shard-rows", "fsdp2") for m in ("uniform", "exact")]
    listed += [Case("qwen2", "exact", p, checkpointing=True, engine="fsdp2") for p in ("autocast", "mixed")]
    return listed


def config_of(name: str) -> Any:
    """The configuration of a model."""
    values = dict(CONFIGS[name])
    kind = getattr(transformers, values.pop("kind"))
    return kind(**values, bos_token_id=None, eos_token_id=1, pad_token_id=0)


def planned(case: Case) -> tuple[int, Mode]:
    """Bytes that `mogeo plan` gives for a rank's device, and the mode by that name."""
    config = config_of(case.model)
    found = trace(
        config,
        sequences=case.sequences,
        tokens=case.tokens,
        precision=case.precision,  # type: ignore[arg-type]
        checkpointing=case.checkpointing,
    )
    setup = Setup(
        outline(config), found.peaks, case.objectives, case.precision, case.optimizer, case.engine, case.ranks,
        refresh_every=_STEPS - 1,
    )  # fmt: skip
    mode = next(mode for mode in modes(setup) if mode.name == case.mode)
    return memory(mode, setup).device, mode


def known(mode: Mode) -> bool:
    """Whether the installed optimizer takes the mode's keywords."""
    return set(mode.keywords) <= set(inspect.signature(MultiObjectiveOptimizer).parameters)


# ---- a step, for real ------------------------------------------------------------------------------------------------


def take_steps(case: Case, mode: Mode) -> None:
    """Build the model and take a few steps: the optimizer's state is there from the second on."""
    torch.manual_seed(0)
    dtype = torch.bfloat16 if case.precision == "bf16" else torch.float32
    model = transformers.AutoModelForCausalLM.from_config(config_of(case.model), dtype=dtype).train()
    if case.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if case.precision == "mixed":
        policy = fsdp.MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        fsdp.fully_shard = partial(fsdp.fully_shard, mp_policy=policy)  # type: ignore[assignment]
    engine = make_engine(model, torch.device("cpu"), current_processes(), case.engine == "fsdp2")
    keywords = eval(f"dict({', '.join(f'{k}={v}' for k, v in mode.keywords.items())})", {"torch": torch})
    if case.engine == "ddp-shard-rows":
        keywords["shard_rows"] = True
    optimizer = MultiObjectiveOptimizer(base_optimizer(case.optimizer, model), **keywords)
    ids = torch.randint(2, 1000, (case.sequences, case.tokens))
    mask = torch.ones(case.sequences, case.tokens, dtype=torch.bool)
    mask[-1, -1] = False  # padded, as batches are
    reference = torch.zeros(case.sequences)

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=case.precision == "autocast"):
            scores = engine.log_probs(ids, mask, mask)
        chosen, rejected = (scores - reference).chunk(2)
        return dpo_loss(chosen - rejected, 0.1).sum()

    for _ in range(_STEPS):
        with engine.reducing(2 if case.engine == "ddp-shard-rows" else 1):
            optimizer.backward({str(k): loss for k in range(case.objectives)})
        optimizer.step()
        optimizer.zero_grad()


def base_optimizer(name: str, model: Any) -> torch.optim.Optimizer:
    """The optimizer by that name, at its leanest."""
    if name == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9, fused=True)
    from lion_pytorch import Lion

    lion: torch.optim.Optimizer = Lion(model.parameters(), lr=1e-6)
    return lion


def allocated(work: Callable[[], object]) -> int:
    """Bytes of torch's allocator at their highest while `work` runs, over what there was before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    events: list[tuple[int, int]] = []

    def visit(nodes: Iterable[Any]) -> None:
        for node in nodes:
            if type(node.extra_fields).__name__ == "_ExtraFields_Allocation":
                events.append((node.start_time_ns, node.extra_fields.alloc_size))
            visit(node.children)

    assert profile.profiler is not None
    assert profile.profiler.kineto_results is not None
    visit(profile.profiler.kineto_results.experimental_event_tree())
    now = highest = 0
    for _, size in sorted(events, key=lambda event: event[0]):
        now += size
        highest = max(highest, now)
    return highest


def resident(work: Callable[[], object]) -> int:
    """Bytes by which resident memory at its highest lies above what it was before."""

    def status(field: str) -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
        return 1024 * int(line.split()[1])

    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts from here
    before = status("VmRSS")
    work()
    return status("VmHWM") - before


def measure_here(case: Case, by: str) -> int:
    """Bytes of this process; with several ranks, of one of them."""
    torch.set_num_threads(1)
    if case.ranks > 1:
        rank, store = int(os.environ["RANK"]), dist.FileStore(os.environ["STORE"], case.ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=case.ranks)
    _, mode = planned(case)  # imports and caches whatever a model needs, before anything is measured
    found = {"allocations": allocated, "resident": resident}[by](lambda: take_steps(case, mode))
    if case.ranks > 1:
        leave_process_group()
    return found


def measure(case: Case, by: str) -> int:
    """The same, in fresh processes; of several ranks, the one that takes most."""
    command = [sys.executable, "-W", "ignore", __file__, "--one", json.dumps(asdict(case)), "--by", by]
    with tempfile.TemporaryDirectory() as folder:
        places = {"STORE": f"{folder}/store", "OMP_NUM_THREADS": "1"}
        malloc = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
        processes = [
            subprocess.Popen(
                command, env={**os.environ, **places, **malloc, "RANK": str(rank)}, stdout=subprocess.PIPE,
                stderr=subprocess.PIPE, text=True,
            )
            for rank in range(case.ranks)
        ]  # fmt: skip
        told = [process.communicate() for process in processes]
    if any(process.returncode for process in processes):
        raise SystemExit(f"{case}: {told[0][1]}")
    return max(int(out.splitlines()[-1]) for out, _ in told)


# ---- the table -------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that this script runs")
    parser.add_argument("--only", nargs="*", default=[], metavar="TEXT", help="cases whose description holds all these")
    parser.add_argument("--repeats", type=int, default=3, help="of the resident measurement; 0 leaves it out")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--by", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(measure_here(Case(**json.loads(options.one)), options.by))
        return

    machine = describe("transformers")
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    print(f"\n{'MiB':66}{'planned':>9}{'allocated':>11}{'error':>8}{'resident (lowest … highest)':>38}{'error':>8}")
    results, left_out = [], []
    for case in cases(options.quick):
        label = ", ".join(str(value) for value in (
            case.model, case.mode, case.precision, "checkpointing" if case.checkpointing else "plain",
            case.engine, case.optimizer,
        ))  # fmt: skip
        if not all(text in label for text in options.only):
            continue
        expected, mode = planned(case)
        if not known(mode):
            left_out.append(label)
            continue
        exact = measure(case, "allocations")
        rss = sorted(measure(case, "resident") for _ in range(options.repeats))
        line = f"{label:66}{expected / MIB:9.0f}{exact / MIB:11.0f}{expected / exact - 1:+8.1%}"
        if rss:
            middle = statistics.median(rss)
            spread = f"{middle / MIB:.0f} ({rss[0] / MIB:.0f} … {rss[-1] / MIB:.0f})"
            line += f"{spread:>38}{expected / middle - 1:+8.1%}"
        print(line, flush=True)
        results.append({**asdict(case), "planned": expected, "allocated": exact, "resident": rss})
    for label in left_out:
        print(f"left out: {label}: this version of mogeo has no such keyword")
    worst = max(results, key=lambda result: abs(result["planned"] / result["allocated"] - 1))
    print(f"\nfurthest from the allocations: {worst['planned'] / worst['allocated'] - 1:+.1%}")
    if options.json:
        options.json.write_text(
            json.dumps({"machine": machine, "results": results, "left_out": left_out}, indent=1) + "\n", "utf-8"
        )


if __name__ == "__main__":
    main()
