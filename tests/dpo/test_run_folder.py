"""What a run leaves on disk: whole at any moment, and refused where it does not fit."""

import json

import pytest
import torch

from mogeo.dpo.run_folder import RunFolder, check_output, fingerprint
from mogeo.errors import InputError


def test_metrics_are_strict_json_and_rewind_to_a_step(tmp_path):
    folder = RunFolder(tmp_path / "run", resume=False)
    records = [{"step": step, "x": 0.1 * step, "bad": [float("nan"), {"y": float("inf")}]} for step in range(4)]
    for record in records:
        folder.append(record)
    path = tmp_path / "run" / "metrics.jsonl"
    whole = path.read_text("utf-8")
    assert [json.loads(line, parse_constant=pytest.fail)["bad"] for line in whole.splitlines()] == [
        [None, {"y": None}]
    ] * 4
    path.write_text(whole + '{"step": 4, "x"', "utf-8")  # a crash in the middle of a line
    kept = folder.rewind(2)
    assert [record["step"] for record in kept] == [0, 1, 2]
    assert path.read_text("utf-8") == "".join(whole.splitlines(keepends=True)[:3])


def test_a_crash_while_a_checkpoint_is_written_leaves_the_last_one(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, resume=False)
    folder.save_checkpoint({"step": 1})

    def half(state, at):
        at.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half)
    with pytest.raises(OSError, match="disk full"):
        folder.save_checkpoint({"step": 2})
    assert folder.load_checkpoint() == {"step": 1}


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"half")
    with pytest.raises(InputError, match=r"checkpoint '.*checkpoint.pt' cannot be read"):
        RunFolder(tmp_path, resume=False).load_checkpoint()


def test_the_reference_is_computed_once_per_fingerprint(tmp_path):
    calls = []

    def compute():
        calls.append(1)
        return [torch.tensor([1.0 * len(calls)])]

    folder = RunFolder(tmp_path, resume=False)
    for key, expected in (("a", 1.0), ("a", 1.0), ("b", 2.0), ("b", 2.0)):
        assert folder.reference(key, compute)[0].tolist() == [expected]


def test_a_fingerprint_sees_every_weight_and_every_setting(make_model):
    model = make_model()
    before = fingerprint(model, [1, "a"])
    assert fingerprint(make_model(), [1, "a"]) == before
    assert fingerprint(model, [1, "b"]) != before
    with torch.no_grad():
        model.lm_head.weight[-1, -1] += 1e-7
    assert fingerprint(model, [1, "a"]) != before
    assert fingerprint(model.to(torch.bfloat16), [1, "a"]) != before


def test_an_output_folder_that_does_not_fit_is_refused_before_anything_is_touched(tmp_path):
    check_output(tmp_path / "new", resume=False)
    assert not (tmp_path / "new").exists()
    with pytest.raises(InputError, match="holds no run to resume"):
        check_output(tmp_path / "new", resume=True)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file; name a folder"):
        check_output(tmp_path / "file", resume=False)

    folder = RunFolder(tmp_path / "run", resume=False)
    folder.write_settings({"beta": 0.5})
    with pytest.raises(InputError, match=r"already holds a run; resume it \(--resume\)"):
        check_output(tmp_path / "run", resume=False)
    with pytest.raises(InputError, match="ended before its first checkpoint"):
        check_output(tmp_path / "run", resume=True)
    folder.save_checkpoint({"step": 1})
    check_output(tmp_path / "run", resume=True)
    folder.model.mkdir()  # a crash while the final model was saved
    check_output(tmp_path / "run", resume=True)
    folder.finish()
    with pytest.raises(InputError, match="is finished; there is nothing to resume"):
        check_output(tmp_path / "run", resume=True)


def test_a_run_is_not_resumed_with_other_settings(tmp_path):
    folder = RunFolder(tmp_path, resume=False)
    folder.write_settings({"beta": 0.5, "betas": (0.9, 0.99), "gone": 1})
    folder.check_settings({"beta": 0.5, "betas": (0.9, 0.99), "gone": 1})
    with pytest.raises(InputError, match=r"beta was 0.5, is 0.1; gone was 1, is None"):
        folder.check_settings({"beta": 0.1, "betas": (0.9, 0.99)})


def test_a_run_from_before_there_was_a_setting_had_its_default(tmp_path):
    folder = RunFolder(tmp_path, resume=False)
    folder.write_settings({"beta": 0.5})
    folder.check_settings({"beta": 0.5, "sketch": None, "every": 1}, {"beta": 0.1, "sketch": None, "every": 1, "x": 2})
    with pytest.raises(InputError, match=r"\(every was 1, is 2\)"):
        folder.check_settings({"beta": 0.5, "every": 2}, {"every": 1})
