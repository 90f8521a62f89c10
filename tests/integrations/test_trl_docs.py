"""What README.md and docs/trl.md say about TRL runs: three changed lines, launched as well, and every form of data."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("trl")


from tests.integrations.tiny import config, make_model, make_pairs, make_tokenizer

ROOT = Path(__file__).parent.parent.parent

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning:transformers")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the README's script finds its data, and, under the model's name, a tiny model."""
    model = tmp_path / "Qwen" / "Qwen2.5-0.5B-Instruct"
    make_model().save_pretrained(model)
    make_tokenizer().save_pretrained(model)
    rows = [{**pair, "helpfulness": 1, "honesty": (-1) ** i} for i, pair in enumerate(make_pairs(16))]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def readme_scripts() -> tuple[str, str]:
    """The script before and after the change, set to run on a CPU."""
    (diff,) = re.findall(r"```diff\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = diff.replace('DPOConfig("runs/dpo")', 'DPOConfig("runs/dpo", use_cpu=True)').splitlines()
    assert sum(line.startswith("+") for line in lines) == 3
    before, after = ("\n".join(line[1:] for line in lines if not line.startswith(sign)) for sign in "+-")
    return before, after


@pytest.mark.filterwarnings("ignore:The pin_memory:UserWarning")
@pytest.mark.parametrize("after", [False, True])
def test_the_readmes_script_trains_before_and_after_three_lines_changed(folder: Path, after: bool) -> None:
    names: dict[str, Any] = {}
    exec(readme_scripts()[after], names)
    assert ("weights/honesty" in names["trainer"].state.log_history[-1]) == after
    assert (folder / "runs/dpo/checkpoint-6/optimizer.pt").exists()


@pytest.mark.slow
def test_accelerate_launches_it_on_two_processes(folder: Path) -> None:
    script = readme_scripts()[1] + (
        "\nimport torch\n"
        "state = trainer.accelerator\n"
        "flat = torch.cat([p.detach().flatten() for p in trainer.model.parameters()])\n"
        "torch.save((state.num_processes, type(trainer.model_wrapped).__name__, flat), f'{state.process_index}.pt')\n"
    )
    (folder / "align.py").write_text(script)
    launch = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--multi_gpu"]
    options = {"num_processes": 2, "num_machines": 1, "mixed_precision": "no", "dynamo_backend": "no"}
    options["main_process_port"] = 0  # a free one
    done = subprocess.run(
        [*launch, *(f"--{name}={value}" for name, value in options.items()), "align.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    import torch

    first, second = (torch.load(folder / f"{rank}.pt") for rank in range(2))
    assert first[:2] == second[:2] == (2, "DistributedDataParallel")
    assert torch.equal(first[2], second[2])


def test_every_form_of_data_in_the_page(folder: Path) -> None:
    from datasets import Dataset

    from mogeo.integrations.trl import MultiObjectiveDPOTrainer

    page = (ROOT / "docs" / "trl.md").read_text().replace('DPOConfig("runs/dpo"', 'DPOConfig("runs/dpo", use_cpu=True')
    names: dict[str, Any] = {
        "pairs": Dataset.from_json("pairs.jsonl"),
        "model": "Qwen/Qwen2.5-0.5B-Instruct",
        "others": {"args": config("runs/dpo", bf16=True)},
    }
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)
        assert isinstance(names["trainer"], MultiObjectiveDPOTrainer)
        names["trainer"].train()
        assert names["trainer"].state.global_step > 0
