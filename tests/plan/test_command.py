"""`mogeo plan` by the command line, and against what a step of a tiny model really allocates."""

from __future__ import annotations

import argparse
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mogeo.cli import main

ROOT = Path(__file__).parent.parent.parent
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500,
    "tie_word_embeddings": True, "max_position_embeddings": 256,
}  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(CONFIG))
    return path


def plan(config: Path, *options: str) -> dict[str, Any]:
    out = config.with_name("plan.json")
    assert main(["plan", "--model", str(config), "--tokens", "32", "--json", str(out), *options]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_plan_from_a_config(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    found = plan(config, "--objectives", "4")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(config))
    assert found["model"]["elements"] == sum(p.numel() for p in model.parameters())  # tied ones count once
    names = [mode["name"] for mode in found["modes"]]
    assert {"uniform", "exact", "bf16 rows", "host rows", "sketch", "refresh"} <= set(names)
    printed = capsys.readouterr().out
    assert "Take " in printed
    assert all(name in printed for name in names)
    assert "left out" not in printed


def test_the_advice_can_be_followed(config: Path) -> None:
    """Every mode's keywords are the optimizer's."""
    from mogeo import MultiObjectiveOptimizer

    base = torch.optim.SGD([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    for mode in plan(config, "--objectives", "2")["modes"]:
        keywords = {name: eval(value, {"torch": torch}) for name, value in mode["keywords"].items()}
        MultiObjectiveOptimizer(base, **keywords)


@pytest.mark.parametrize("ranks", [1, 8])
def test_every_mode_has_its_options_of_align(ranks: int) -> None:
    """The command parses to settings that hold, and that are the mode's keywords."""
    from mogeo.dpo.command import _config, add_arguments
    from mogeo.dpo.train import check_settings
    from mogeo.plan.command import _align
    from mogeo.plan.memory import Peaks, Setup, Shape, modes

    setup = Setup(Shape(1, 0, 1, 1, 1, 1), Peaks(0, 0), 4, engine="none" if ranks == 1 else "fsdp2", ranks=ranks)
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for mode in modes(setup):
        either, *command = _align(argparse.Namespace(model="M", tokens=512, sequences=4), mode, setup)
        assert either == "or"
        words = " ".join(line.removesuffix("\\") for line in command).split()
        settings = _config(parser.parse_args(words[words.index("align") + 1 :]))
        check_settings(settings, ranks=ranks)
        assert (settings.max_length, settings.micro_batch, settings.fsdp) == (512, 2, ranks > 1)
        for name, value in mode.keywords.items():
            assert repr(getattr(settings, name)).strip("'") == value.strip('"').replace("torch.bfloat16", "bf16")


@pytest.mark.slow
def test_what_does_not_fit_exactly_is_advised_with_its_options(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    smallest = min(mode["bytes"]["device"] for mode in plan(config, "--objectives", "8")["modes"][1:])
    capsys.readouterr()
    found = plan(config, "--objectives", "8", "--memory", str(smallest / 1e9), "--reserve", "0")
    (keywords,) = [mode["keywords"] for mode in found["modes"] if mode["name"] == found["chosen"]]
    printed = capsys.readouterr().out
    assert keywords
    assert all(f"--{name.replace('_', '-')}" in printed.split("mogeo align")[1] for name in keywords)


@pytest.mark.slow
def test_what_does_not_fit_says_what_would(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert plan(config, "--objectives", "4", "--memory", "0.001", "--reserve", "0")["chosen"] is None
    assert "Nothing fits" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--objectives", "0"], "--objectives 0"),
        (["--objectives", "2", "--sequences", "3"], "even number"),
        (["--objectives", "2", "--engine", "fsdp2"], "--ranks 1"),
        (["--objectives", "2", "--precision", "fp32", "--no-autocast-cache"], "only autocast has a cache"),
        (["--objectives", "2", "--memory", "-1"], "--memory"),
        (["--objectives", "2", "--tokens", "1000"], "lower --tokens"),
    ],
)
def test_bad_input_is_named(options: list[str], message: str, config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(config), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(tmp_path / "none"), "--objectives", "2"]) == 2
    assert "does not exist" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["uniform", "exact", "bf16 rows", "sketch", "refresh", "sketch, refresh"])
def test_predictions_are_within_a_tenth_of_what_is_allocated(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch's own record of allocations, which is the same on every run."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    spec = importlib.util.spec_from_file_location("plan_check", ROOT / "benchmarks" / "plan_check.py")
    assert spec is not None
    assert spec.loader is not None
    check = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "plan_check", check)
    spec.loader.exec_module(check)
    case = check.Case("tiny", mode, objectives=3, sequences=2, tokens=128)
    planned, found = check.planned(case)
    measured = check.allocated(lambda: check.take_steps(case, found))
    assert abs(planned / measured - 1) <= 0.1
