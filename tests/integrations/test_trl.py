"""MultiObjectiveDPOTrainer against DPOTrainer, and against itself where the two have nothing in common."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("trl")
pytest.importorskip("peft")

from datasets import Dataset
from peft import LoraConfig
from trl import DPOTrainer

from mogeo import MultiObjectiveOptimizer
from mogeo.errors import InputError
from mogeo.integrations.trl import MultiObjectiveDPOTrainer
from tests.integrations.tiny import (
    NAMES,
    agreeing,
    config,
    make_model,
    make_pairs,
    make_tokenizer,
    make_trainer,
    parameters,
    with_labels,
)
from tests.profiles import slow_but

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning:transformers"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:trl"),
    pytest.mark.filterwarnings("ignore::UserWarning:torch.utils.checkpoint"),
    pytest.mark.filterwarnings("ignore::UserWarning:peft"),
]


def trained(trainer: Any, **options: Any) -> Tensor:
    trainer.train(**options)
    return parameters(trainer)


def logged(trainer: Any, name: str) -> list[float]:
    return [entry[name] for entry in trainer.state.log_history if name in entry]


def plain(dataset: Dataset) -> Dataset:
    return dataset.select_columns(["prompt", "chosen", "rejected"])


# ---- held against the original ---------------------------------------------------------------------------------------

LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)

# How both are made: options of DPOConfig, and arguments of the trainer.
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "reference model": ({}, {}),
    "precomputed reference": ({"precompute_ref_log_probs": True}, {"reference": False}),
    "accumulation": ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 3}, {}),
    "a last step with fewer micro-batches": ({"gradient_accumulation_steps": 3, "max_steps": 4}, {}),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}),
    "reentrant checkpointing": (
        {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {},
    ),
    "bf16 autocast": ({"bf16": True}, {}),
    "clipping": ({"max_grad_norm": 0.1}, {}),
    "no clipping": ({"max_grad_norm": 0.0}, {}),
    "dropout": ({"disable_dropout": False}, {"dropout": 0.2}),
    "LoRA": ({}, {"reference": False, "peft_config": LORA}),
    "LoRA, checkpointed, accumulated": (
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"reference": False, "peft_config": LORA},
    ),
    "two loss types": ({"loss_type": ["sigmoid", "sft"], "loss_weights": [0.7, 0.3]}, {}),
    "another loss": ({"loss_type": "ipo"}, {}),
}


@pytest.mark.parametrize("setting", slow_but(SETTINGS, "precomputed reference", "accumulation", "LoRA"))
def test_equal_objectives_and_uniform_weights_are_dpo_bit_for_bit(tmp_path: Path, setting: str) -> None:
    options, named = SETTINGS[setting]
    dataset = agreeing(16, NAMES)
    dropout = named.get("dropout", 0.0)
    named = {key: value for key, value in named.items() if key != "dropout"}
    made, results = [], []
    for kind, rows, more in (
        (DPOTrainer, plain(dataset), {}),
        (MultiObjectiveDPOTrainer, dataset, {"objectives": NAMES, "weighting": "uniform"}),
    ):
        model = make_model(attention_dropout=dropout)
        made.append(make_trainer(kind, tmp_path, rows, options=options, model=model, **named, **more))
        before = parameters(made[-1])
        results.append((trained(made[-1]), before))
    (original, before), (ours, _) = results
    assert not torch.equal(original, before)
    assert torch.equal(original, ours)
    # What TRL logs, it still does, and the same.
    for theirs, mine in zip(made[0].state.log_history[:-1], made[1].state.log_history[:-1], strict=True):
        assert {name: mine[name] for name in theirs} == pytest.approx(theirs, rel=1e-6)
    for name in NAMES:
        assert logged(made[1], f"loss/{name}") == pytest.approx(logged(made[0], "loss"), rel=1e-5)
        if setting != "accumulation":  # whose short micro-batch outweighs its pairs in what TRL logs
            assert logged(made[1], f"rewards/margins/{name}") == pytest.approx(
                logged(made[0], "rewards/margins"), rel=1e-5
            )


@pytest.mark.parametrize("weighting", slow_but(["mgda", "mgda-decoupled", "group-dro"], "mgda-decoupled"))
def test_equal_objectives_are_dpo_under_every_weighting(tmp_path: Path, weighting: str) -> None:
    dataset = agreeing(16, NAMES[:3])
    original = trained(make_trainer(DPOTrainer, tmp_path, plain(dataset)))
    trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, dataset, objectives=NAMES[:3], weighting=weighting)
    torch.testing.assert_close(trained(trainer), original, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_experts_are_balanced_as_in_dpo(tmp_path: Path) -> None:
    """Their balancing loss is part of each objective: weights that sum to 1 leave it as it was."""
    from transformers import MixtralConfig, MixtralForCausalLM

    results = []
    dataset = agreeing(16, NAMES)
    for kind, rows, more in (
        (DPOTrainer, plain(dataset), {}),
        (MultiObjectiveDPOTrainer, dataset, {"objectives": NAMES, "weighting": "uniform"}),
    ):
        models = []
        for _ in range(2):
            torch.manual_seed(0)
            shape = MixtralConfig(
                **{**make_model().config.to_dict(), "model_type": "mixtral", "num_local_experts": 3},
                router_aux_loss_coef=0.5,
            )
            models.append(MixtralForCausalLM(shape))
        trainer = kind(
            model=models[0],
            ref_model=models[1],
            args=config(tmp_path),
            train_dataset=rows,
            processing_class=make_tokenizer(),
            **more,
        )
        results.append(trained(trainer))
        assert len(logged(trainer, "aux_loss")) == 3
    assert torch.equal(*results)


def test_one_objective_is_dpo_bit_for_bit(tmp_path: Path) -> None:
    dataset = agreeing(16, ["warm"])
    original = trained(make_trainer(DPOTrainer, tmp_path, plain(dataset)))
    trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, dataset, objectives=["warm"], weighting="uniform")
    assert torch.equal(trained(trainer), original)


def test_a_label_of_minus_one_is_the_pair_the_other_way_round(tmp_path: Path) -> None:
    pairs = make_pairs(16)
    swapped = [{**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} for pair in pairs]
    original = trained(make_trainer(DPOTrainer, tmp_path, Dataset.from_list(swapped)))
    rows = with_labels(pairs, {"warm": [-1] * 16})
    trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, rows, objectives=["warm"], weighting="uniform")
    # Padding is the same, but sums over rows are taken in another order.
    torch.testing.assert_close(trained(trainer), original, rtol=1e-5, atol=1e-6)


# ---- labels that differ ----------------------------------------------------------------------------------------------

MIXED = {
    "warm": [1, -1, 0, 1, 0, 0, 1, 1, 0, -1, 1, 0],
    "size": [0, 1, 1, -1, 0, 1, 0, 0, 1, 1, 0, 0],
    "brief": [0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, -1],
}


@pytest.mark.parametrize("weighting", slow_but(["uniform", "mgda-decoupled", "group-dro"], "mgda-decoupled"))
def test_micro_batches_are_the_big_batch(tmp_path: Path, weighting: str) -> None:
    """Though they hold unequal numbers of labels, and some of them none of an objective."""
    rows = with_labels(make_pairs(12), MIXED)
    results = []
    for size, accumulation in ((12, 1), (4, 3), (1, 12)):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulation}
        trainer = make_trainer(
            MultiObjectiveDPOTrainer, tmp_path, rows, options=options, objectives=[*MIXED], weighting=weighting
        )
        results.append((trained(trainer), trainer.state.log_history))
    for result, history in results[1:]:
        torch.testing.assert_close(result, results[0][0], rtol=1e-4, atol=1e-5)
        for entry, expected in zip(history[:-1], results[0][1][:-1], strict=True):
            ours = [name for name in expected if name == "loss" or name.rpartition("/")[2] in MIXED]
            assert {n: entry[n] for n in ours} == pytest.approx({n: expected[n] for n in ours}, rel=1e-3, abs=1e-5)


def test_the_gradient_of_an_objective_is_dpos_on_its_pairs(tmp_path: Path) -> None:
    """One step of plain SGD on one objective at a time, by weights of 0 and 1."""
    pairs = make_pairs(12)
    options = {"per_device_train_batch_size": 12, "max_steps": 1, "optim": "sgd", "max_grad_norm": 0.0}
    for index, name in enumerate(MIXED):
        own = [
            pair if label > 0 else {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
            for pair, label in zip(pairs, MIXED[name], strict=True)
            if label
        ]
        original = trained(make_trainer(DPOTrainer, tmp_path, Dataset.from_list(own), options=options))
        alone = f"linear({', '.join(str(int(k == index)) for k in range(3))})"
        trainer = make_trainer(
            MultiObjectiveDPOTrainer,
            tmp_path,
            with_labels(pairs, MIXED),
            options=options,
            objectives=[*MIXED],
            weighting=alone,
        )
        torch.testing.assert_close(trained(trainer), original, rtol=1e-5, atol=1e-6)


def test_an_objective_that_a_step_does_without_is_left_out_of_it(tmp_path: Path) -> None:
    labels = {"warm": [1] * 11 + [0], "size": [0] * 11 + [1]}
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        with_labels(make_pairs(12), labels),
        options={"num_train_epochs": 1, "max_steps": -1, "per_device_train_batch_size": 3},
        objectives=["warm", "size"],
    )
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "weights/size" in entry]
    without = [entry for entry in steps if "loss/size" not in entry]
    assert len(steps) == 4
    assert len(without) == 3
    for entry in without:
        assert entry["weights/size"] == 0
        assert entry["weights/warm"] == 1
        assert entry["loss"] == pytest.approx(entry["loss/warm"])
        assert "grad_norm/size" not in entry
        assert "hurt/size" not in entry
        assert "cosine/warm/size" not in entry


def test_logs_are_what_the_report_says(tmp_path: Path) -> None:
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        with_labels(make_pairs(12), MIXED),
        options={"per_device_train_batch_size": 12},
        objectives=[*MIXED],
    )
    reports = []
    combine = MultiObjectiveOptimizer.combine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MultiObjectiveOptimizer, "combine", lambda self: reports.append(combine(self)) or reports[-1])
        trainer.train()
    told = [report for number, report in enumerate(reports) if report is not (reports[number - 1] if number else None)]
    steps = [entry for entry in trainer.state.log_history if "weights/warm" in entry]
    for entry, report in zip(steps, told, strict=True):
        expected = report.to_dict()
        for name in MIXED:
            assert entry[f"weights/{name}"] == expected["weights"][name]
            assert entry[f"grad_norm/{name}"] == expected["grad_norms"][name]
            assert entry[f"alignment/{name}"] == expected["alignment"][name]
            assert entry[f"loss/{name}"] == pytest.approx(expected["losses"][name])
        assert entry["cosine/warm/size"] == expected["cosines"][0][1]
        assert entry["grad_norm"] == pytest.approx(expected["direction_norm"], rel=1e-5)


@pytest.mark.parametrize("weighting", slow_but(["uniform", "mgda-decoupled"], "uniform"))
def test_a_tracked_run_logs_mean_gradients_under_any_weighting(tmp_path: Path, weighting: str) -> None:
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        with_labels(make_pairs(24), {"warm": [1] * 24, "size": [1, -1] * 12}),
        options={"per_device_train_batch_size": 8, "max_steps": 12, "learning_rate": 1e-3},
        objectives=["warm", "size"],
        weighting=weighting,
        track=0.9,
        guarantee_descent=True,
    )
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert (optimizer.track, optimizer.guarantee_descent) == (0.9, True)
    expected = optimizer.report.to_dict()
    last = [entry for entry in trainer.state.log_history if "weights/warm" in entry][-1]
    assert expected["alignment_of"] == "mean gradients"
    for name in ("warm", "size"):
        assert last[f"evidence/{name}"] == expected["evidence"][name]
        assert last[f"noise_scale_at_least/{name}"] == expected["noise_scale_interval"][name][0]
    assert last["alignment/warm"] == expected["alignment"]["warm"]
    assert last["hurt/warm"] == optimizer.report.hurt[0]
    # The labels of size cancel: its mean gradient cannot be told from zero, and neither can who hurts it.
    assert expected["evidence"]["size"] == 0
    assert not {"alignment/size", "hurt/size", "mean_cosine/warm/size"} & last.keys()
    assert logged(trainer, "noise_scale/warm")[-1] == expected["noise_scale"]["warm"]


@pytest.mark.slow
def test_logs_are_means_over_the_steps_between(tmp_path: Path) -> None:
    rows = with_labels(make_pairs(12), MIXED)
    often, seldom = (
        make_trainer(
            MultiObjectiveDPOTrainer,
            tmp_path,
            rows,
            options={"per_device_train_batch_size": 12, "logging_steps": steps, "max_steps": 4},
            objectives=[*MIXED],
        )
        for steps in (1, 4)
    )
    assert torch.equal(trained(often), trained(seldom))
    for name in ("loss/warm", "weights/size", "grad_norm/brief", "cosine/warm/size", "rewards/margins/size"):
        values = logged(often, name)
        assert len(values) == 4
        assert logged(seldom, name) == [pytest.approx(sum(values) / 4)]


# ---- numbers, engines, checkpoints -----------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_grad_scaler_lowers_its_scale_over_an_overflow_and_changes_nothing_else(tmp_path: Path) -> None:
    rows = with_labels(make_pairs(12), MIXED)

    def made(scale: float | None, steps: int = 4) -> Any:
        options = {"per_device_train_batch_size": 6, "gradient_accumulation_steps": 2, "max_steps": steps}
        trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, rows, options=options, objectives=[*MIXED])
        if scale is not None:
            # What fp16=True does on a GPU, and Accelerate refuses on a CPU.
            scaler = trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            trainer.accelerator.unscale_gradients = lambda: scaler.unscale_(trainer.optimizer.optimizer)
        return trainer

    unscaled, scaled, overflowing = made(None), made(2.0**12), made(1e38, steps=1)
    torch.testing.assert_close(trained(scaled), trained(unscaled), rtol=1e-5, atol=1e-6)
    assert logged(scaled, "grad_norm/warm") == pytest.approx(logged(unscaled, "grad_norm/warm"), rel=1e-5)
    before = parameters(overflowing).clone()
    overflowing.train()
    assert overflowing.accelerator.scaler.get_scale() == pytest.approx(1e38 / 2)
    assert torch.equal(parameters(overflowing), before)


@pytest.mark.parametrize(
    ("labels", "options"),
    [
        (MIXED, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}),  # in a stratified order
        ({"warm": [1] * 12, "size": [1, -1] * 6}, {"disable_dropout": False}),  # in TRL's
    ],
)
@pytest.mark.parametrize("saved", slow_but([2, 4], 4))  # in the first epoch, and in the second
@pytest.mark.parametrize("track", [None, 0.8])
def test_a_resumed_run_is_the_uninterrupted_one(
    tmp_path: Path, labels: dict[str, list[int]], options: dict[str, Any], saved: int, track: float | None
) -> None:
    def made() -> Any:
        return make_trainer(
            MultiObjectiveDPOTrainer,
            tmp_path,
            with_labels(make_pairs(12), labels),
            options={"max_steps": 6, "save_strategy": "steps", "save_steps": 1, **options},
            model=make_model(attention_dropout=0.2),
            objectives=[*labels],
            weighting="group-dro(0.5)" if track is None else "mgda-decoupled",
            track=track,
        )

    whole = made()
    expected = trained(whole)
    resumed = made()
    assert torch.equal(trained(resumed, resume_from_checkpoint=str(tmp_path / f"checkpoint-{saved}")), expected)
    for name in ("weights/warm", *(() if track is None else ("evidence/warm", "alignment/warm"))):
        assert logged(resumed, name) == logged(whole, name)


def test_a_saved_model_loads_without_mogeo(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, agreeing(8, NAMES), objectives=NAMES)
    expected = trained(trainer)
    trainer.save_model(str(tmp_path / "saved"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert torch.equal(torch.cat([p.detach().flatten() for p in model.parameters()]), expected)


def test_callbacks_see_the_direction_and_ones_own_optimizer_is_used(tmp_path: Path) -> None:
    from transformers import TrainerCallback

    norms = []

    class Looking(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            norms.append(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))

    model = make_model()
    own = MultiObjectiveOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2), "mgda", objectives=[*MIXED])
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        with_labels(make_pairs(12), MIXED),
        model=model,
        objectives=[*MIXED],
        optimizers=(own, None),
        callbacks=[Looking()],
    )
    trainer.train()
    trainer.train()  # again: what Accelerate has wrapped is not wrapped twice
    assert own.report is not None
    assert len(norms) == 6
    assert all(norm > 0 for norm in norms)


# ---- evaluation ------------------------------------------------------------------------------------------------------


def test_evaluation_is_per_objective_and_its_loss_the_mean(tmp_path: Path) -> None:
    held_out = with_labels(make_pairs(12, seed=1), MIXED)
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        agreeing(12, [*MIXED]),
        options={"per_device_eval_batch_size": 5, "eval_strategy": "steps", "eval_steps": 3},
        eval_dataset=held_out,
        objectives=[*MIXED],
    )
    trainer.train()
    found = trainer.evaluate()
    for name, labels in MIXED.items():
        own = [
            pair if label > 0 else {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]}
            for pair, label in zip(make_pairs(12, seed=1), labels, strict=True)
            if label
        ]
        rows = Dataset.from_list(own)
        theirs = make_trainer(DPOTrainer, tmp_path, rows, eval_dataset=rows, options={"per_device_eval_batch_size": 12})
        theirs.model.load_state_dict(trainer.model.state_dict())
        expected = theirs.evaluate()
        assert found[f"eval_loss/{name}"] == pytest.approx(expected["eval_loss"], rel=1e-5)
        for metric in ("rewards/accuracies", "rewards/margins"):
            assert found[f"eval_{metric}/{name}"] == pytest.approx(expected[f"eval_{metric}"], rel=1e-4)
    assert found["eval_loss"] == pytest.approx(sum(found[f"eval_loss/{name}"] for name in MIXED) / 3)
    assert logged(trainer, "eval_loss") == [found["eval_loss"]] * 2
    assert "eval_entropy" in found


def test_evaluation_takes_every_form_and_several_sets(tmp_path: Path) -> None:
    names = ["warm", "size"]
    sets = {"warm": Dataset.from_list(make_pairs(4, seed=1)), "size": Dataset.from_list(make_pairs(6, seed=2))}
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        agreeing(8, names),
        eval_dataset={"sets": sets, "columns": agreeing(5, names)},
        objectives=names,
    )
    found = trainer.evaluate()
    assert found["eval_columns_loss/warm"] == pytest.approx(found["eval_columns_loss/size"])
    assert {"eval_sets_loss", "eval_sets_loss/warm", "eval_sets_loss/size"} <= found.keys()
    assert trainer.evaluate(sets)["eval_loss"] == pytest.approx(found["eval_sets_loss"])
    assert trainer.evaluate(sets, metric_key_prefix="test")["test_loss"] == pytest.approx(found["eval_sets_loss"])


def test_evaluation_with_a_precomputed_reference(tmp_path: Path) -> None:
    names = ["warm", "size"]
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        agreeing(8, names),
        options={"precompute_ref_log_probs": True},
        eval_dataset=agreeing(4, names),
        objectives=names,
    )
    assert trainer.evaluate()["eval_loss"] == pytest.approx(0.6931, abs=1e-4)  # the policy is the reference
    assert trainer.evaluate(agreeing(3, names))["eval_loss"] == pytest.approx(0.6931, abs=1e-4)


# ---- forms of data ---------------------------------------------------------------------------------------------------


def ultrafeedback_rows(count: int = 12) -> list[dict[str, Any]]:
    answers = [("red big", "5", "5"), ("red small", "5", "1"), ("blue big", "1", "5"), ("blue small", "1", "N/A")]
    return [
        {
            "instruction": "what is it like ?" + " and" * extra,
            "completions": [
                {"response": text, "annotations": {"warm": {"Rating": warm}, "size": {"Rating": size}}}
                for text, warm, size in answers
            ],
        }
        for extra in range(count)
    ]


@pytest.mark.parametrize("chat", slow_but([False, True], True))
def test_every_form_of_data_trains(tmp_path: Path, chat: bool) -> None:
    names = ["warm", "size"]
    sets = {"warm": Dataset.from_list(make_pairs(8)), "size": Dataset.from_list(make_pairs(16)[4:])}
    forms = {"UltraFeedback": Dataset.from_list(ultrafeedback_rows())}
    if not chat:
        forms |= {"sets": sets, "columns": agreeing(12, names)}  # type: ignore[dict-item]
        forms["stream"] = agreeing(12, names).to_iterable_dataset()
    for data in forms.values():
        trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, data, objectives=names, chat=chat)
        trainer.train()
        steps = [entry for entry in trainer.state.log_history if "weights/warm" in entry]
        assert len(steps) == 3
        assert all({"loss/warm", "loss/size"} <= entry.keys() for entry in steps)  # in every step, though sets differ


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("named", "options", "message"),
    [
        ({"objectives": []}, {}, "pass at least one name"),
        ({"objectives": ["warm", "warm"]}, {}, "names must differ"),
        ({"objectives": ["warm", "calm"]}, {}, "no column for calm"),
        ({"weighting": "mgda-decopled"}, {}, "mgda-decopled"),
        ({"weighting": "linear(1, 1, 1)"}, {}, "3"),
        ({}, {"loss_type": "hinge"}, "hinge loss reaches 0"),
        ({}, {"activation_offloading": True}, "activation_offloading=True"),
        ({"track": 1.5}, {}, "track=1.5: pass a decay"),
        ({"weigh_by": "batch"}, {}, "weigh_by='batch': choose 'mean' or 'mini-batch'"),
        ({"weigh_by": "mini-batch"}, {}, "pass track=0.95 as well"),
    ],
)
def test_errors_name_culprit_and_cure(
    tmp_path: Path, named: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    rows = agreeing(4, ["warm", "size"])
    with pytest.raises(ValueError, match=re.escape(message)):
        make_trainer(
            MultiObjectiveDPOTrainer, tmp_path, rows, options=options, **{"objectives": ["warm", "size"], **named}
        )


def test_data_errors_come_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no data|missing"):
        MultiObjectiveDPOTrainer(
            "no/such-model",
            args=config(tmp_path),
            train_dataset={"warm": Dataset.from_list(make_pairs(2))},
            processing_class=make_tokenizer(),
            objectives=["warm", "size"],
        )


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"is_deepspeed_enabled": True}, "use FSDP2 (fsdp_version: 2), or DDP"),
        ({"is_fsdp_enabled": True}, "FSDP1 flattens parameters"),
    ],
)
def test_engines_that_do_not_fit_are_refused(tmp_path: Path, engine: dict[str, bool], message: str) -> None:
    trainer = make_trainer(MultiObjectiveDPOTrainer, tmp_path, agreeing(4, NAMES), objectives=NAMES)
    vars(trainer).update(engine)
    with pytest.raises(NotImplementedError, match=re.escape(message)):
        trainer._fit_to_engine()


def test_an_optimizer_for_other_objectives_is_refused(tmp_path: Path) -> None:
    model = make_model()
    own = MultiObjectiveOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2))
    trainer = make_trainer(
        MultiObjectiveDPOTrainer, tmp_path, agreeing(4, NAMES), model=model, objectives=NAMES, optimizers=(own, None)
    )
    with pytest.raises(ValueError, match=re.escape("make it with MultiObjectiveOptimizer(..., objectives=['warm'")):
        trainer.train()


@pytest.mark.parametrize(
    "option", [{"track": 0.9}, {"track": 0.9, "weigh_by": "mini-batch"}, {"guarantee_descent": True}]
)
def test_options_beside_an_optimizer_that_has_its_own_are_refused(tmp_path: Path, option: dict[str, Any]) -> None:
    model = make_model()
    own = MultiObjectiveOptimizer(torch.optim.SGD(model.parameters(), lr=1e-2), objectives=NAMES)
    with pytest.raises(ValueError, match="hand track, weigh_by and guarantee_descent to that MultiObjectiveOptimizer"):
        make_trainer(
            MultiObjectiveDPOTrainer,
            tmp_path,
            agreeing(4, NAMES),
            model=model,
            objectives=NAMES,
            optimizers=(own, None),
            **option,
        )


def test_a_loss_that_is_not_positive_is_told_by_name(tmp_path: Path) -> None:
    trainer = make_trainer(
        MultiObjectiveDPOTrainer,
        tmp_path,
        agreeing(16, ["warm", "size"]),
        options={"loss_type": "robust", "label_smoothing": 0.4, "max_steps": 60, "learning_rate": 0.05},
        objectives=["warm", "size"],
    )
    with pytest.raises(ValueError, match=r"objective 'warm' has loss -.*mgda-normalized"):
        trainer.train()
