"""`mogeo align` under real launchers: two ranks give what one process gives; each goes on where the other stopped."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from mogeo import cli
from tests.interruptions import stop_after

ROOT = Path(__file__).parents[2]
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ACCELERATE = ("accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0")
STEPS = 200
ATOL = 3e-6  # of numbers around 1, after up to STEPS steps of fp32

pytestmark = pytest.mark.slow


@pytest.fixture
def align(tmp_path, make_model, tokenizer, rows):
    """The arguments of `mogeo align` on the tiny model; without dropout, whose masks differ between ranks."""
    make_model(attention_dropout=0.0, tie_word_embeddings=True).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    (tmp_path / "rated.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")

    def arguments(output, *options):
        files = ["--model", tmp_path / "start", "--data", tmp_path / "rated.jsonl", "--output", tmp_path / output]
        data = ["--held-out", "7", "--pairing", "all", "--pairs", "6", "--beta", "0.2"]
        habits = ["--lr", "3e-3", "--autocast", "none", "--device", "cpu", "--eval-every", "3", "--quiet"]
        return [str(argument) for argument in ["align", *files, *data, *habits, *options]]

    return arguments


def launch(launcher, arguments):
    command = [sys.executable, "-m", *launcher, "-m", "mogeo", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    told, _ = process.communicate(timeout=300)
    assert process.returncode == 0, told
    return told


def records(run):
    lines = (run / "metrics.jsonl").read_text("utf-8").splitlines()
    return [{key: value for key, value in json.loads(line).items() if key != "seconds"} for line in lines]


def assert_same_run(one, other, atol=ATOL):
    """The same records and files, and a final model of the same weights under the same names."""
    for record, expected in zip(records(other), records(one), strict=True):
        assert record == approximately(expected, atol)
    weights, expected_weights = (load_file(run / "model" / "model.safetensors") for run in (other, one))
    assert weights.keys() == expected_weights.keys()
    for name, weight in expected_weights.items():
        assert weights[name].numpy() == pytest.approx(weight.numpy(), rel=0, abs=10 * atol)
    assert {path.name for path in other.iterdir()} == {path.name for path in one.iterdir()}


def approximately(value, atol):
    if isinstance(value, dict):
        return {key: approximately(item, atol) for key, item in value.items()}
    if isinstance(value, list):
        return [approximately(item, atol) for item in value]
    return pytest.approx(value, rel=atol, abs=atol) if isinstance(value, float) else value


@pytest.mark.parametrize(
    ("launcher", "options"),
    [
        (TORCHRUN, ["--micro-batch", "2", "--sketch", "65536", "--refresh-every", "3"]),
        (TORCHRUN, ["--fsdp", "--max-grad-norm", "0.5"]),
        (TORCHRUN, ["--fsdp", "--weighting", "linear(1,0)"]),
        (ACCELERATE, ["--track", "0.8"]),
    ],
    ids=[
        "ddp, micro-batches and sketches",
        "fsdp, clipping",
        "fsdp, a loss without a backward",
        "accelerate, tracked",
    ],
)
def test_two_ranks_give_what_one_process_gives(align, tmp_path, launcher, options):
    process = launch(launcher, align("two", "--max-steps", "7", *options))
    alone = [option for option in options if option != "--fsdp"]
    assert cli.main(align("one", "--max-steps", "7", *alone)) == 0
    told = finish(process)
    assert told.count("Held-out preferences, before and after") == 1  # one rank prints
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_ctrl_c_stops_all_ranks_after_one_step_and_one_process_goes_on(align, tmp_path):
    steps = ["--max-steps", str(STEPS), "--save-every", "0", "--weighting", "group-dro(0.5)"]
    assert cli.main(align("whole", *steps)) == 0
    process = launch(TORCHRUN, align("cut", *steps, "--fsdp"))
    until(lambda: len(records(tmp_path / "cut")) > 20, process)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=300)
    assert told.count("stopped after step ") == 1
    assert "resume with: torchrun --nproc-per-node 2 -m mogeo align " in told
    assert records(tmp_path / "cut")[-1]["step"] < STEPS
    assert cli.main(align("cut", *steps, "--resume")) == 0
    assert_same_run(tmp_path / "whole", tmp_path / "cut", 30 * ATOL)


def test_shards_go_on_where_one_process_stopped(align, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3)
    steps = ["--max-steps", "7", "--weighting", "group-dro(0.5)"]
    assert cli.main(align("cut", *steps)) == 130
    process = launch(TORCHRUN, align("cut", *steps, "--fsdp", "--resume"))
    assert cli.main(align("whole", *steps)) == 0
    finish(process)
    assert_same_run(tmp_path / "whole", tmp_path / "cut")


def test_a_tracked_run_that_goes_on_in_shards_says_that_its_averages_begin_anew(align, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3)
    steps = ["--max-steps", "7", "--track", "0.8"]
    assert cli.main(align("cut", *steps)) == 130
    told = finish(launch(TORCHRUN, align("cut", *steps, "--fsdp", "--resume")))
    assert "averages of gradients over steps (track=) begin anew" in told
    evidence = [sum(r["evidence"].values()) for r in records(tmp_path / "cut") if r["kind"] == "train"]
    assert evidence[3] == 0  # of the fourth step alone, nothing can be told


def until(holds, process):
    """Wait for something that a run writes."""
    while process.poll() is None:
        try:
            if holds():
                return
        except (FileNotFoundError, ValueError):  # not there yet, or half a line
            pass
        time.sleep(0.02)
    pytest.fail(process.communicate()[0])
