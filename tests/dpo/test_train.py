"""The training loop: equal to plain DPO where it should be, resumable bit for bit, honest about what it left out."""

import json
import math
import re
import signal
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from mogeo.dpo import train as module
from mogeo.dpo.data import build_preferences, split_rows
from mogeo.dpo.losses import PreferenceLoss, dpo_loss
from mogeo.dpo.tokens import ShuffledEpochs
from mogeo.dpo.train import AlignConfig, Interrupted, align
from mogeo.errors import InputError
from tests.interruptions import stop_after
from tests.profiles import slow_but

SETTINGS = {
    "learning_rate": 3e-3,
    "warmup_steps": 2,
    "max_steps": 9,
    "pairs_per_objective": 4,
    "beta": 0.2,
    "eval_every": 2,
    "save_every": 4,
    "autocast": "none",
    "device": "cpu",
}

BOTH = 0.75
"""Accuracy that both objectives can have at once: of one pair in four, each wants what the other does not."""


@pytest.fixture
def sets(rows):
    train, held_out = split_rows(rows, 8, seed=0)
    return build_preferences(train, pairing="all"), build_preferences(held_out, pairing="all")


@pytest.fixture
def run(make_model, tokenizer, sets):
    """align() on the tiny model, with SETTINGS and what a test changes in them."""

    def go(output=None, resume=False, model=None, data=sets, **changes):
        config = AlignConfig(**{**SETTINGS, **changes})
        return align(model or make_model(), tokenizer, *data, config, output=output, resume=resume, progress=False)

    return go


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def same_bits(one, other):
    return all(torch.equal(a, b) for a, b in zip(weights(one), weights(other), strict=True))


# ---- what it learns --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", ["uniform", "mgda-decoupled"])
@pytest.mark.parametrize("loss", slow_but(["sigmoid", "ipo"], "sigmoid"))
def test_both_objectives_are_learned_and_carry_over_to_held_out_prompts(run, weighting, loss):
    result = run(weighting=weighting, loss=loss, max_steps=40, learning_rate=1e-2)
    assert result.before.accuracy == {"warm": 0.5, "size": 0.5}
    assert min(result.after.accuracy.values()) >= BOTH
    assert min(result.after.margin.values()) > 0.1
    losses = [record["loss"] for record in result.history if record["kind"] == "train"]
    assert all(losses[-1][name] < losses[0][name] for name in losses[0])


def test_uniform_equals_a_plain_loop_over_the_mean_loss(run, make_model, tokenizer, sets):
    """DPO written out: all logits, one backward on the mean of the objectives, torch's AdamW."""
    result = run(weighting="uniform", max_steps=5, model=make_model(attention_dropout=0.0))

    policy, reference = make_model(attention_dropout=0.0), make_model(attention_dropout=0.0)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=3e-3, weight_decay=0.0)

    def log_prob(model, prompt, response):
        head = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
        start = len(tokenizer(head)["input_ids"])
        ids = torch.tensor([tokenizer(f"{head}{response} <eos>")["input_ids"]])
        log_probs = F.log_softmax(model(ids).logits[0].double(), -1)
        return sum(log_probs[t - 1, ids[0, t]] for t in range(start, ids.shape[1]))

    orders = {name: ShuffledEpochs(len(pairs), 4, 0, name) for name, pairs in sets[0].pairs.items()}
    for step in range(1, 6):
        optimizer.param_groups[0]["lr"] = AlignConfig(**{**SETTINGS, "max_steps": 5}).learning_rate_at(step, 5)
        total = 0.0
        for name, order in orders.items():
            for pair in (sets[0].pairs[name][i] for i in order(step)):
                h = log_prob(policy, pair.prompt, pair.chosen) - log_prob(policy, pair.prompt, pair.rejected)
                with torch.no_grad():
                    h0 = log_prob(reference, pair.prompt, pair.chosen) - log_prob(reference, pair.prompt, pair.rejected)
                total = total - F.logsigmoid(0.2 * (h - h0)) / 8
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        record = next(r for r in result.history if r["kind"] == "train" and r["step"] == step)
        assert sum(record["loss"].values()) / 2 == pytest.approx(total.item(), rel=1e-4)
    for ours, theirs in zip(result.model.parameters(), policy.parameters(), strict=True):
        torch.testing.assert_close(
            ours, theirs, rtol=0, atol=2e-5
        )  # steps are 3e-3; Adam magnifies rounding of tiny grads


@pytest.mark.parametrize("weighting", ["uniform", "mgda-decoupled"])
def test_micro_batches_add_up_to_the_step(run, make_model, weighting):
    results = [
        run(weighting=weighting, max_steps=3, micro_batch=size, model=make_model(attention_dropout=0.0))
        for size in (None, 3, 1)
    ]
    whole = [record for record in results[0].history if record["kind"] == "train"]
    for part in results[1:]:
        for a, b in zip(whole, [r for r in part.history if r["kind"] == "train"], strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["weight"] == pytest.approx(a["weight"], abs=1e-3)


def test_every_record_says_what_the_step_did(run):
    history = run(max_steps=4).history
    assert [(r["kind"], r["step"]) for r in history] == [
        ("eval", 0), ("train", 1), ("train", 2), ("eval", 2), ("train", 3), ("train", 4), ("eval", 4),
    ]  # fmt: skip
    first = history[1]
    assert first["loss"] == pytest.approx({"warm": math.log(2), "size": math.log(2)}, abs=0.05)  # dropout moves it
    assert sum(first["weight"].values()) == pytest.approx(1)
    assert set(first["grad_norm"]) == set(first["alignment"]) == {"warm", "size"}
    assert first["cosines"][0][0] == pytest.approx(1)
    assert first["learning_rate"] == pytest.approx(1.5e-3)
    assert first["skipped"] == []
    untracked = ("alignment_error", "mean_cosines", "noise_scale", "noise_scale_interval", "evidence")
    assert first["alignment_of"] == "mini-batch"
    assert [first[name] for name in untracked] == [None] * 5
    assert run(max_steps=1, weighting="uniform").history[1]["cosines"] is None


@pytest.mark.parametrize("weighting", ["mgda", "uniform"])
def test_a_tracked_run_records_what_is_known_of_mean_gradients(run, tmp_path, weighting):
    history = run(tmp_path, track=0.8, weighting=weighting, learning_rate=1e-3).history
    records = [record for record in history if record["kind"] == "train"]
    for record in records:
        assert record["alignment_of"] == "mean gradients"
        for name in ("alignment", "alignment_error", "noise_scale", "noise_scale_interval", "evidence"):
            assert set(record[name]) == {"warm", "size"}
        assert all(0 <= share <= 1 for share in record["evidence"].values())
        assert len(record["mean_cosines"]) == len(record["cosines"]) == 2
        if weighting == "uniform":
            assert record["weight"] == {"warm": 0.5, "size": 0.5}
    # Of one step nothing can be told, and of nine that agree a lot.
    assert all(math.isnan(noise) for noise in records[0]["noise_scale"].values())
    assert max(records[-1]["evidence"].values()) == 1
    for low, high in records[-1]["noise_scale_interval"].values():
        assert 0 <= low < high
    written = [record for record in read_metrics(tmp_path) if record["kind"] == "train"]
    assert written[0]["noise_scale"] == {"warm": None, "size": None}  # JSON has no NaN
    assert written[-1]["evidence"] == records[-1]["evidence"]


def test_bf16_autocast_keeps_fp32_weights_and_lands_near_fp32(run, make_model):
    results = {
        autocast: run(autocast=autocast, max_steps=20, learning_rate=1e-2, model=make_model(attention_dropout=0.0))
        for autocast in ("none", "bf16")
    }
    assert {p.dtype for p in results["bf16"].model.parameters()} == {torch.float32}
    assert results["bf16"].before.accuracy == {"warm": 0.5, "size": 0.5}
    for name, margin in results["none"].after.margin.items():
        assert results["bf16"].after.margin[name] == pytest.approx(margin, rel=0.25)


# ---- the optimizer's options -----------------------------------------------------------------------------------------

OPTIONS = {
    "guarantee_descent": True,
    "preference": {"size": 2.0, "warm": 1.0},
    "min_weight": 0.1,
    "smoothing": 0.5,
    "refresh_every": 3,
    "row_dtype": "bf16",
    "host_rows": True,
}


def test_the_optimizer_gets_its_options(run, monkeypatch):
    made = []
    original = module.mogeo.MultiObjectiveOptimizer
    monkeypatch.setattr(
        module.mogeo,
        "MultiObjectiveOptimizer",
        lambda *args, **options: made.append(options) or original(*args, **options),
    )
    run(**OPTIONS, track="auto", weigh_by="mini-batch", max_steps=1)
    run(sketch=64, max_steps=1)
    full = [options for options in made if "row_dtype" in options]  # but for those that check the settings
    for name, value in {
        **OPTIONS,
        "track": "auto",
        "weigh_by": "mini-batch",
        "row_dtype": torch.bfloat16,
        "sketch": None,
    }.items():
        assert full[1][name] == value
    assert full[-1]["sketch"] == 64


def test_records_say_which_steps_solved(run):
    history = run(**OPTIONS, max_steps=5).history
    records = [record for record in history if record["kind"] == "train"]
    assert [record["age"] for record in records] == [0, 1, 2, 0, 1]
    for record in records:
        assert (record["cosines"] is None) == (record["alignment"] is None) == (record["age"] > 0)
        assert record["weight"] == records[record["step"] - 1 - record["age"]]["weight"]


def test_a_sketch_that_loses_nothing_gives_the_run_of_rows(run, make_model):
    """The losses are evaluated twice a step, with the same dropout, and micro-batch by micro-batch."""
    rows, sketched = (run(max_steps=4, micro_batch=3, **options) for options in ({}, {"sketch": 1 << 16}))
    for one, other in zip(rows.history, sketched.history, strict=True):
        for key in ("weight", "loss") if one["kind"] == "train" else ("margin",):
            assert other[key] == pytest.approx(one[key], rel=1e-3)
    for one, other in zip(weights(rows.model), weights(sketched.model), strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=2e-5)  # see the plain loop above


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": {"warm": 1.0}}, r"preference does not match the objectives.*missing \['size'\]"),
        ({"preference": {"warm": 1.0, "size": 1.0, "taste": 1.0}}, r"preference .*unknown \['taste'\]"),
        ({"min_weight": 0.5}, r"min_weight=0.5 for K = 2 objectives.*less than 1/K"),
        ({"sketch": 64, "host_rows": True}, "sketch=64 with .*there are no rows then"),
        ({"preference": {"warm": 1.0, "size": 0.0}}, "preference .*pass one finite number > 0"),
        ({"min_weight": -0.1}, "min_weight=-0.1"),
        ({"smoothing": 1.0}, "smoothing=1.0"),
        ({"refresh_every": 0}, "refresh_every=0"),
        ({"track": 1.0}, "track has to be a number above 0.5 and below 1"),
        ({"sketch": 0}, "sketch=0"),
        ({"max_grad_norm": 0.0}, "max_grad_norm=0.0"),
        ({"loss": "dpo"}, "unknown loss 'dpo'"),
        ({"loss": "ipo(0.1)"}, r"loss 'ipo\(0.1\)': label_smoothing is defined for the sigmoid loss only"),
        ({"loss": "sigmoid(a)"}, r"loss 'sigmoid\(a\)': could not convert string to float"),
        ({"loss": "modpo(1, 0)"}, r"MODPO's weights \[1.0, 0.0\]: give one positive number for each of warm, size"),
        ({"loss": 3}, "loss=3: pass a name .*PreferenceLoss"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_anything_is_scored(run, monkeypatch, changes, message):
    monkeypatch.setattr(module, "score_sequences", lambda *args, **options: pytest.fail("scored"))
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_the_loss_on_the_page_trains(run):
    page = (Path(__file__).parents[2] / "docs" / "align.md").read_text("utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "LengthPenalised" in b)
    names = {}
    exec(compile(block, "docs/align.md", "exec"), names)
    assert run(loss=names["LengthPenalised"](), max_steps=1).history[1]["loss"]


def test_a_loss_of_ones_own_is_a_class(run, sets):
    """Half of DPO's, with a number for each pair that it computes beforehand."""

    class Half(PreferenceLoss):
        def prepare(self, before):
            assert before.train is sets[0]
            return {name: torch.full((len(pairs),), 0.5) for name, pairs in before.train.pairs.items()}

        def __call__(self, objective, margins, beta, prepared):
            assert prepared.shape == margins.shape
            return prepared * dpo_loss(margins, beta)

        def __repr__(self):
            return "half"

    halved, whole = (run(loss=loss, max_steps=1).history[1]["loss"] for loss in (Half(), "sigmoid"))
    assert halved == pytest.approx({name: 0.5 * loss for name, loss in whole.items()})


# ---- stopping and going on -------------------------------------------------------------------------------------------


def crash():
    raise RuntimeError("power cut")


def read_metrics(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines()]
    for record in records:
        record.pop("seconds", None)
    return records


@pytest.mark.parametrize(
    "settings",
    [
        *slow_but([{"weighting": "mgda-decoupled"}, {"weighting": "group-dro(0.5)"}, {"weighting": "uniform"}]),
        {"sketch": 64, "refresh_every": 5},  # steps 3 and 4 are held
        {"track": 0.8},
        *slow_but([{"track": 0.8, "weigh_by": "mini-batch"}]),
        OPTIONS,
    ],
)
def test_a_run_stopped_by_ctrl_c_or_a_crash_resumes_bit_for_bit(run, tmp_path, monkeypatch, make_model, settings):
    whole = run(tmp_path / "whole", **settings)

    stop_after(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted, match="stopped after step 3"):
        run(tmp_path / "cut", **settings)
    stop_after(monkeypatch, 6, crash)  # the last checkpoint is that of step 4: two steps are done again
    with pytest.raises(RuntimeError, match="power cut"):
        run(tmp_path / "cut", **settings, resume=True)
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "st')
    torch.manual_seed(1234)  # whatever the random state is by then
    resumed = run(tmp_path / "cut", **settings, resume=True)

    assert same_bits(resumed.model, whole.model)
    assert not same_bits(whole.model, make_model())
    assert read_metrics(tmp_path / "cut") == read_metrics(tmp_path / "whole")
    assert (resumed.before, resumed.after) == (whole.before, whole.after)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_resumed_run_draws_other_dropout_masks_unless_the_random_state_is_restored(run, tmp_path, monkeypatch):
    """Else the test above could not see a random state that was forgotten."""
    whole = run()
    stop_after(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path)
    monkeypatch.setattr(torch, "set_rng_state", lambda state: None)
    assert not same_bits(run(tmp_path, resume=True).model, whole.model)


def test_the_reference_is_not_computed_again_on_resume(run, tmp_path, monkeypatch):
    stop_after(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        run(tmp_path)
    scored = []
    original = module.score_sequences
    monkeypatch.setattr(
        module, "score_sequences", lambda *args, **kwargs: scored.append(1) or original(*args, **kwargs)
    )
    run(tmp_path, resume=True)
    assert len(scored) == 4  # evaluations after steps 4, 6, 8 and 9


def test_a_second_ctrl_c_stops_at_once(run, tmp_path, monkeypatch):
    def twice():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    stop_after(monkeypatch, 3, twice)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_without_an_output_ctrl_c_is_pythons(run, monkeypatch):
    stop_after(monkeypatch, 1, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        run()


def test_other_settings_data_or_weights_cannot_be_resumed(run, tmp_path, monkeypatch, rows):
    stop_after(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path)
    with pytest.raises(InputError, match=r"beta was 0\.2, is 0\.3"):
        run(tmp_path, resume=True, beta=0.3)
    with pytest.raises(InputError, match=r"refresh_every was 1, is 2; sketch was None, is 64"):
        run(tmp_path, resume=True, refresh_every=2, sketch=64)
    other = tuple(build_preferences(part) for part in split_rows(rows, 8, seed=1))
    with pytest.raises(InputError, match=r"cannot be resumed with other settings \(data was"):
        run(tmp_path, resume=True, data=other)


def test_a_run_begun_before_there_was_tracking_goes_on_untracked(run, tmp_path, monkeypatch):
    whole = run()
    stop_after(monkeypatch, 3, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path)
    settings = json.loads((tmp_path / "run.json").read_text("utf-8"))
    del settings["track"]
    (tmp_path / "run.json").write_text(json.dumps(settings), "utf-8")
    with pytest.raises(InputError, match=r"track was None, is 0\.9"):
        run(tmp_path, resume=True, track=0.9)
    assert same_bits(run(tmp_path, resume=True).model, whole.model)


def test_a_run_may_go_on_with_its_rows_elsewhere(run, tmp_path, monkeypatch):
    whole = run(refresh_every=4)
    stop_after(monkeypatch, 2, lambda: signal.raise_signal(signal.SIGINT))
    with pytest.raises(Interrupted):
        run(tmp_path, refresh_every=4)
    with pytest.warns(UserWarning, match="saved with host_rows=False"):
        resumed = run(tmp_path, refresh_every=4, resume=True, host_rows=True)
    assert same_bits(resumed.model, whole.model)


def test_the_final_model_loads_and_is_the_one_returned(run, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    result = run(tmp_path)
    assert same_bits(AutoModelForCausalLM.from_pretrained(tmp_path / "model"), result.model)
    assert AutoTokenizer.from_pretrained(tmp_path / "model").chat_template is not None
    assert not (tmp_path / "checkpoint.pt").exists()
    with pytest.raises(InputError, match="is finished"):
        run(tmp_path, resume=True)


# ---- what is refused or noted ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weighting": "mgda-coupled"}, "unknown weighting 'mgda-coupled'.*mgda-decoupled"),
        ({"weighting": "linear(1, 2, 3)"}, "3 weights for 2 objectives"),
        ({"weighting": 3}, "pass a name"),
        ({"loss": "hinge"}, "the hinge loss reaches 0"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"max_length": 5}, "longer than 5 tokens"),
        ({"beta": -1.0}, "beta has to be a positive number"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_training(run, changes, message):
    with pytest.raises(InputError, match=message):
        run(**changes)


def test_a_run_needs_the_same_objectives_on_both_sides_and_a_folder_to_resume(run, sets, rows):
    with pytest.raises(InputError, match="held-out pairs"):
        run(data=(sets[0], build_preferences(rows, ["warm"])))
    with pytest.raises(InputError, match="resume needs the output folder"):
        run(resume=True)


def test_what_is_left_out_is_noted(run, tokenizer, make_model, caplog):
    tokenizer.chat_template = None
    longest = 12  # "what is very blue like ? and and and warm big", and the end token
    result = run(max_length=longest - 1, max_steps=1, model=make_model().to(torch.bfloat16))
    text = "\n".join(result.notes)
    assert "bfloat16: small updates are rounded away" in text
    assert "no chat template" in text
    assert f"training pairs left out, longer than {longest - 1} tokens" in text
    assert text in "\n".join(caplog.messages)


def test_hinge_works_with_a_weighting_that_does_not_divide_by_the_loss(run):
    result = run(loss="hinge", weighting="mgda", max_steps=40, learning_rate=1e-2)
    assert min(result.after.accuracy.values()) >= BOTH
