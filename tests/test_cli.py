"""The command line: fast help, one clear line for every mistake, and a whole run with its interruption."""

import importlib.util
import json
import subprocess
import sys

import pytest

from mogeo import cli, weightings
from mogeo.dpo.config import AlignConfig
from tests.interruptions import stop_after
from tests.tiny import save, tiny_llama, tiny_tokenizer

WORDS = ["<pad>", "<eos>", "<unk>", "what", "is", "red", "blue", "green", "warm", "cold"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    model = tiny_llama(len(WORDS), hidden_size=8, intermediate_size=16, max_position_embeddings=16)
    return save(tmp_path_factory.mktemp("model"), model, tiny_tokenizer(WORDS, template=None))


def rated(prompt):
    rate = lambda help, truth: {"help": {"Rating": help}, "truth": {"Rating": truth}}  # noqa: E731
    completions = [("warm", rate("5", "1")), ("cold", rate("1", "4")), ("", rate("3", "3")), ("red", rate("N/A", "2"))]
    return {"instruction": prompt, "completions": [{"response": r, "annotations": a} for r, a in completions]}


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "rated.jsonl"
    prompts = [f"what is {a} {b}" for a in ("red", "blue", "green") for b in ("red", "blue", "green", "warm")]
    path.write_text("".join(json.dumps(rated(prompt)) + "\n" for prompt in prompts), "utf-8")
    return path


@pytest.fixture
def align(model_folder, data, tmp_path):
    """Run `mogeo align` in this process with small settings; returns the exit code."""

    def go(*options, model=model_folder, data=data, output=tmp_path / "run"):
        small = ["--max-steps", "6", "--pairs", "2", "--held-out", "0.25", "--device", "cpu", "--quiet"]
        given = ["--model", str(model), "--data", str(data), "--output", str(output)]
        return cli.main(["align", *given, *small, *options])

    return go


# ---- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], *([command, "--help"] for command in cli.COMMANDS)])
def test_help_answers_without_waiting_for_torch(arguments):
    code = (
        "import sys, mogeo.cli\n"
        f"try: mogeo.cli.main({arguments!r})\n"
        "except SystemExit as end: assert not end.code\n"
        "loaded = {'torch', 'transformers', 'numpy', 'datasets'} & set(sys.modules)\n"
        "sys.exit(f'loaded {loaded}' if loaded else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "mogeo" in done.stdout


def test_python_m_mogeo_is_the_same_command():
    done = subprocess.run([sys.executable, "-m", "mogeo", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("mogeo ")


def test_help_names_every_weighting_and_every_setting(capsys):
    with pytest.raises(SystemExit):
        cli.main(["align", "--help"])
    text = capsys.readouterr().out
    assert all(name in text for name in weightings.NAMES)
    options = {"learning_rate": "lr", "pairs_per_objective": "pairs"}
    for name in AlignConfig.__dataclass_fields__:
        assert f"--{options.get(name, name).replace('_', '-')} " in text


# ---- mistakes --------------------------------------------------------------------------------------------------------

MISTAKES = [
    (["--weighting", "mgda-coupled"], "unknown weighting 'mgda-coupled'"),
    (["--weighting", "linear(1,2,3)"], "3 weights for 2 objectives"),
    (["--beta", "-1"], "beta has to be a positive number"),
    (["--model", "missing.gguf"], "model 'missing.gguf' does not exist"),
    (["--data", "missing.jsonl"], "data file 'missing.jsonl' does not exist"),
    (["--objectives", "help,honesty"], "no completion is rated for honesty; the data rates help, truth"),
    (["--held-out", "0"], "both sides need at least one"),
    (["--preference", "help=2"], "preference does not match the objectives ['help', 'truth']: missing ['truth']"),
    (["--preference", "help=2", "truth=0"], "preference (2.0, 0.0): pass one finite number > 0"),
    (["--preference", "help=2", "help=1"], "--preference names 'help' more than once"),
    (["--min-weight", "0.6"], "min_weight=0.6 for K = 2 objectives"),
    (["--smoothing", "1"], "smoothing=1.0: pass a number s, 0 ≤ s < 1"),
    (["--refresh-every", "0"], "refresh_every=0"),
    (["--track", "1.5"], "track has to be a number above 0.5 and below 1"),
    (["--track", "0.5"], "track has to be a number above 0.5 and below 1"),
    (["--sketch", "64", "--row-dtype", "bf16"], "there are no rows then"),
    (["--loss", "dpo"], "unknown loss 'dpo': choose one of sigmoid, ipo, hinge, modpo"),
    (["--loss", "sigmoid(0.5)"], "loss 'sigmoid(0.5)': label_smoothing must be in [0, 0.5), got 0.5"),
    (["--loss", "modpo(1,2,3)"], "MODPO's weights [1.0, 2.0, 3.0]: give one positive number for each of help, truth"),
    (["--resume"], "holds no run to resume"),
    (["--max-length", "3"], "longer than 3 tokens"),
    (["--device", "abacus"], "device 'abacus' cannot be used"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(align, capsys, options, message):
    assert align(*options) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1
    assert errors[0].startswith("mogeo: error: ")
    assert message in errors[0]


def test_mistakes_are_found_before_the_model_is_loaded(align, monkeypatch, capsys):
    from mogeo.dpo import models

    monkeypatch.setattr(models, "load_model", lambda source: pytest.fail("loaded"))
    for options, message in MISTAKES[:-2]:  # the last two need the tokenizer, or torch's devices
        assert align(*options) == 2
        assert message in capsys.readouterr().err


def test_rows_that_do_not_fit_are_named_with_row_and_column(align, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps({"prompt": "what"}) + "\n", "utf-8")
    assert align(data=path) == 2
    assert "row 1: column 'instruction' is missing (found: prompt)" in capsys.readouterr().err


def test_held_out_prompts_without_a_pair_say_what_to_do(align, data, capsys):
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    for row in rows[1:]:
        for completion in row["completions"]:
            completion["annotations"]["help"]["Rating"] = "N/A"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    codes = {align("--held-out", "1", "--seed", str(seed)) for seed in range(3)}
    assert codes == {2}
    assert "hold out more with --held-out" in capsys.readouterr().err


def test_arguments_that_do_not_parse_are_argparses(align, capsys):
    for options in (
        ["--held-out", "many"],
        ["--schedule", "step"],
        ["--lr", "small"],
        ["--preference", "help:2"],
        ["--track", "often"],
        ["--nonsense"],
    ):
        with pytest.raises(SystemExit) as end:
            align(*options)
        assert end.value.code == 2
        assert options[0] in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        cli.main([])
    assert end.value.code == 2


def test_a_missing_extra_says_what_to_install(monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else found(name))
    assert cli.main(["align", "--model", "m", "--data", "d", "--output", "o"]) == 2
    assert capsys.readouterr().err == "mogeo: error: datasets not installed; run: pip install 'mogeo[dpo]'\n"


# ---- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_tells_what_it_used_and_what_it_reached(align, tmp_path, capsys):
    assert align("--weighting", "mgda-decoupled") == 0
    told = capsys.readouterr().out
    counts = next(line.split() for line in told.splitlines() if line.startswith("help (training)"))
    assert counts[2:] == ["9", "0", "0", "0", "9", "9"]  # of 9 prompts, each with an unrated and an empty completion
    assert "Held-out preferences, before and after" in told
    assert "worst" in told
    assert "What the steps did to each objective" in told
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} >= {
        "metrics.jsonl",
        "run.json",
        "data.json",
        "model",
        "reference.pt",
        "report.html",
    }
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6]
    assert align() == 2
    assert "already holds a run" in capsys.readouterr().err


def test_a_run_without_matplotlib_says_so_once_and_goes_on(align, monkeypatch, tmp_path, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert align() == 0
    assert sum("mogeo[report]" in message for message in caplog.messages) == 1
    assert (tmp_path / "run" / "model").is_dir()


def test_ctrl_c_saves_says_how_to_go_on_and_going_on_gives_the_same_model(align, tmp_path, monkeypatch, capsys):
    import torch
    from transformers import AutoModelForCausalLM

    assert align(output=tmp_path / "whole") == 0
    stop_after(monkeypatch, 3)
    assert align() == 130
    told = capsys.readouterr().err
    assert "stopped after step 3" in told
    command = next(line for line in told.splitlines() if line.startswith("resume with: mogeo align "))
    assert command.endswith("--resume")
    assert cli.main(command.removeprefix("resume with: mogeo ").split()) == 0
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / name / "model") for name in ("whole", "run")]
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
def test_the_optimizers_options_are_the_runs_settings(align, tmp_path):
    steered = ["--preference", "help=2", "truth=1", "--min-weight", "0.05", "--smoothing", "0.9", "--guarantee-descent"]
    assert align(*steered, "--refresh-every", "3", "--row-dtype", "bf16", "--host-rows") == 0
    assert align("--sketch", "64", "--track", "0.9", "--weigh-by", "mini-batch", output=tmp_path / "sketched") == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    expected = {
        "preference": {"help": 2.0, "truth": 1.0}, "min_weight": 0.05, "smoothing": 0.9, "guarantee_descent": True,
        "refresh_every": 3, "row_dtype": "bf16",
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected
    sketched = json.loads((tmp_path / "sketched" / "run.json").read_text())
    assert (sketched["sketch"], sketched["track"], sketched["weigh_by"]) == (64, 0.9, "mini-batch")


def test_ctrl_c_before_training_is_one_line(align, monkeypatch, capsys):
    from mogeo.dpo import models

    def interrupted(source):
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "load_model", interrupted)
    assert align() == 130
    assert capsys.readouterr().err.endswith("mogeo: interrupted\n")


def test_modpo_runs_from_rows_to_a_table(align, tmp_path, capsys):
    # The preference is the run's; the margins' models have one objective each, and nothing to prefer.
    assert align("--weighting", "uniform", "--loss", "modpo(2,1)", "--preference", "help=2", "truth=1") == 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text())
    assert settings["loss"] == "modpo(2,1)"
    assert "Held-out preferences" in capsys.readouterr().out
