"""Align a language model with several preference objectives: the training loop, written as a user would write it.

One step: for every objective, the DPO loss of its next pairs; `MultiObjectiveOptimizer` turns their gradients into one
direction; AdamW takes it. Files are the business of `run_folder`, the numbers on held-out pairs that of `evaluate`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import mogeo
from mogeo.dpo.batches import ShuffledEpochs, TokenizedPreferences, TokenSequence, collate, tokenize_preferences
from mogeo.dpo.config import AlignConfig as AlignConfig
from mogeo.dpo.data import Preferences
from mogeo.dpo.errors import InputError
from mogeo.dpo.evaluate import Evaluation, evaluate, score
from mogeo.dpo.interrupt import Interrupted as Interrupted
from mogeo.dpo.interrupt import stop_requests
from mogeo.dpo.losses import dpo_loss, sequence_log_probs
from mogeo.dpo.models import context_length, pad_token, prompt_format_for
from mogeo.dpo.run_folder import Record, RunFolder, fingerprint

logger = logging.getLogger("mogeo")


@dataclass(frozen=True)
class AlignResult:
    """An aligned model, and what happened on the way."""

    model: Any
    history: list[Record]
    """The records of metrics.jsonl: {"kind": "train" | "eval", "step": ..., ...}."""
    before: Evaluation
    after: Evaluation
    notes: list[str] = field(default_factory=list)
    """What the reader of the results should know: pairs left out, a prompt format that was not the one asked for."""


def check_weighting(config: AlignConfig, n_objectives: int | None = None) -> None:
    """Raise InputError for a weighting that does not exist, or cannot work with this loss or number of objectives."""
    try:
        weighting = mogeo.weightings.resolve(config.weighting)
        constant = getattr(weighting, "constant", None)
        if constant is not None and n_objectives is not None:
            constant(n_objectives)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from None
    if config.loss == "hinge" and getattr(weighting, "needs_positive_losses", False):
        raise InputError(
            f"weighting {weighting!r} divides by the loss, and the hinge loss reaches 0; use loss sigmoid, or mgda"
        )


def align(
    model: Any,
    tokenizer: Any,
    train: Preferences,
    held_out: Preferences,
    config: AlignConfig,
    *,
    output: Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> AlignResult:
    """Fine-tune `model` in place with DPO, one preference set per objective, balanced by `config.weighting`.

    The model as it comes in is the reference; its log-probabilities are computed once, before the first step.

    Args:
        model: a causal language model of transformers; fp32 parameters, unless updates may be rounded away.
        tokenizer: its tokenizer.
        train: preferences to learn from; their objectives are the run's, in this order.
        held_out: preferences to measure on, with the same objectives.
        config: everything else.
        output: folder for metrics, checkpoints and the final model; None: nothing is written.
        resume: go on from the checkpoint in `output`; the result is bit-identical to that of an uninterrupted run.
        progress: show progress bars on stderr.

    Raises:
        InputError: settings, data or folder cannot be used.
        Interrupted: Ctrl-C or SIGTERM, with an `output`; without one, KeyboardInterrupt comes through.
    """
    config.check()
    check_weighting(config, len(train.objectives))
    if set(train.objectives) != set(held_out.objectives):
        raise InputError(f"training pairs have objectives {train.objectives}, held-out pairs {held_out.objectives}")
    if resume and output is None:
        raise InputError("resume needs the output folder of the run to go on with")
    folder = None if output is None else RunFolder(output, resume)
    run = _Run(model, tokenizer, train, held_out, config, folder, progress)
    if resume:
        run.restore()
    else:
        run.begin()
    return run.train()


class _Run:
    """What the steps of one run share: model, optimizer, tokens, the reference's scores, history."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        train: Preferences,
        held_out: Preferences,
        config: AlignConfig,
        folder: RunFolder | None,
        progress: bool,
    ) -> None:
        self.config, self.folder, self.progress, self.tokenizer = config, folder, progress, tokenizer
        self.device = torch.device(resolve_device(config.device))
        self.model = model.to(self.device)
        self.notes: list[str] = []
        self.pad = pad_token(tokenizer)
        self.precision = torch.autocast(self.device.type, torch.bfloat16, enabled=config.autocast == "bf16")
        self.objectives = train.objectives
        self._check_precision()
        self.train_set, self.held_out = self._tokenize(train, held_out)
        self.steps = config.steps(max(len(pairs) for pairs in self.train_set.pairs.values()))
        self.order = {
            name: ShuffledEpochs(len(pairs), config.pairs_per_objective, config.seed, name)
            for name, pairs in self.train_set.pairs.items()
        }
        self.settings = self._settings()
        self.optimizer = mogeo.MultiObjectiveOptimizer(
            torch.optim.AdamW(
                [p for p in self.model.parameters() if p.requires_grad],
                lr=config.learning_rate,
                betas=config.betas,
                weight_decay=config.weight_decay,
                # One pass over the parameters; torch's default on the CPU is a Python loop, several times slower.
                fused=self.device.type in ("cpu", "cuda"),
            ),
            config.weighting,
            objectives=self.objectives,
            max_grad_norm=config.max_grad_norm,
        )
        self.done = 0
        self.history: list[Record] = []

    # ---- preparation -------------------------------------------------------------------------------------------------

    def _note(self, text: str) -> None:
        self.notes.append(text)
        logger.warning(text)

    def _check_precision(self) -> None:
        low = {p.dtype for p in self.model.parameters() if p.requires_grad} & {torch.bfloat16, torch.float16}
        if low:
            names = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in low))
            self._note(f"parameters are {names}: small updates are rounded away; load the model in float32")

    def _tokenize(self, train: Preferences, held_out: Preferences) -> tuple[TokenizedPreferences, TokenizedPreferences]:
        used = prompt_format_for(self.tokenizer, self.config.prompt_format)
        if used != self.config.prompt_format:
            self._note("the tokenizer has no chat template: prompts are used as plain text")
        limits = [n for n in (self.config.max_length, context_length(self.model)) if n is not None]
        limit = min(limits, default=None)
        sets = []
        for label, preferences in (("training", train), ("held-out", held_out)):
            tokens = tokenize_preferences(preferences, self.tokenizer, used, limit)
            for name, count in tokens.too_long.items():
                if count:
                    total = count + len(tokens.pairs[name])
                    self._note(f"{name}: {count} of {total} {label} pairs left out, longer than {limit} tokens")
            sets.append(tokens)
        return sets[0], sets[1]

    def _settings(self) -> Record:
        """What has to be the same for a run to be resumed."""
        # Where it runs and how often it saves do not change what is computed.
        settings = {k: v for k, v in self.config.to_dict().items() if k not in ("device", "save_every")}
        parts: list[Any] = []
        for tokens in (self.train_set, self.held_out):
            parts += [tokens.sequences, *(pairs.tolist() for pairs in tokens.pairs.values())]
        return {**settings, "objectives": list(self.objectives), "steps": self.steps, "data": fingerprint(*parts)}

    def _score_reference(self) -> None:
        """Score what the run will see with the model as it came in; from the cache where nothing relevant changed."""
        visited = self._visited()
        parts = ("training", "held-out")
        sets = ([self.train_set.sequences[i] for i in visited], self.held_out.sequences)

        def compute() -> list[Tensor]:
            return [self._score(sequences, f"reference, {part}") for part, sequences in zip(parts, sets, strict=True)]

        if self.folder is None:
            scores = compute()
        else:
            key = fingerprint(self.model, *sets, [self.config.autocast, self._score_batch, str(self.device)])
            scores = self.folder.reference(key, compute)
        self.reference = torch.full((len(self.train_set.sequences),), torch.nan)
        self.reference[visited] = scores[0]
        self.held_out_reference = scores[1]

    def _visited(self) -> list[int]:
        """Training sequences that come up in the run: in a short one, far from all."""
        steps = range(1, self.steps + 1)
        drawn = [self.train_set.pairs[name][order(step)] for name, order in self.order.items() for step in steps]
        return sorted(set(torch.cat(drawn).flatten().tolist()))

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> Record:
        """One optimizer step; returns its record."""
        started = time.perf_counter()
        config = self.config
        rate = config.learning_rate_at(step, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        drawn = {name: order(step) for name, order in self.order.items()}
        self.optimizer.zero_grad()
        for start in range(0, config.pairs_per_objective, self._micro_batch):
            part = slice(start, start + self._micro_batch)
            # Callables: the optimizer runs them one at a time, so one objective's activations are in memory at once.
            self.optimizer.backward({name: self._loss_of(name, indices[part]) for name, indices in drawn.items()})
        report = self.optimizer.combine()
        self.optimizer.step()
        told = report.to_dict()
        return {
            "kind": "train",
            "step": step,
            "learning_rate": rate,
            "loss": told["losses"],
            "weight": told["weights"],
            "grad_norm": told["grad_norms"],
            "cosines": told["cosines"],
            "alignment": told["alignment"],
            "direction_norm": told["direction_norm"],
            "optimality_gap": told["optimality_gap"],
            "skipped": told["skipped"],
            "seconds": time.perf_counter() - started,
        }

    def _loss_of(self, name: str, indices: Tensor) -> Callable[[], Tensor]:
        """The share of these pairs in the objective's mean loss over the step: micro-batches add up to the mean."""

        def loss() -> Tensor:
            flat = self.train_set.pairs[name][indices].T.flatten()  # all chosen, then all rejected
            batch = collate([self.train_set.sequences[i] for i in flat.tolist()], self.pad).to(self.device)
            with self.precision:
                scores = sequence_log_probs(self.model, *batch)
            chosen, rejected = (scores - self.reference[flat].to(self.device)).chunk(2)
            losses = dpo_loss(chosen - rejected, self.config.beta, self.config.loss, self.config.label_smoothing)
            return losses.sum() / self.config.pairs_per_objective

        return loss

    @property
    def _micro_batch(self) -> int:
        return self.config.micro_batch or self.config.pairs_per_objective

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @property
    def _score_batch(self) -> int:
        return 2 * self._micro_batch  # sequences; without gradients they take less memory than in training

    def _score(self, sequences: list[TokenSequence], label: str) -> Tensor:
        with self._bar(label, len(sequences), "seq", leave=False) as bar:
            return score(
                self.model,
                sequences,
                batch_size=self._score_batch,
                pad=self.pad,
                precision=self.precision,
                on_batch=bar.update,
            )

    def _bar(self, label: str, total: int, unit: str, **options: Any) -> Any:
        """A progress bar that leaves its line to the numbers."""
        form = "{desc} {percentage:3.0f}%|{bar:12}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
        return tqdm(
            desc=label,
            total=total,
            unit=unit,
            bar_format=form,
            dynamic_ncols=True,
            disable=not self.progress,
            **options,
        )

    def _evaluate(self, step: int) -> Record:
        # Before the first step the policy is the reference.
        policy = (
            self.held_out_reference if step == 0 else self._score(self.held_out.sequences, f"held-out, step {step}")
        )
        measured = evaluate(policy, self.held_out_reference, self.held_out, self.config.beta)
        return {"kind": "eval", "step": step, **measured.to_dict()}

    # ---- the run -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start from step 0."""
        self._score_reference()
        torch.manual_seed(self.config.seed)  # dropout, the one thing that draws from torch's generator
        if self.folder is not None:
            self.folder.write_settings(self.settings)
        self._record(self._evaluate(0))

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        assert self.folder is not None
        self.folder.check_settings(self.settings)
        self._score_reference()
        state = self.folder.load_checkpoint()
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["random_cuda"], self.device)
        self.done = state["step"]
        self.history = self.folder.rewind(self.done)

    def _save(self) -> None:
        assert self.folder is not None
        self.folder.save_checkpoint(
            {
                "step": self.done,
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "random": torch.get_rng_state(),
                "random_cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            }
        )

    def _record(self, record: Record) -> None:
        self.history.append(record)
        if self.folder is not None:
            self.folder.append(record)

    def train(self) -> AlignResult:
        """All steps that are left; then the final model."""
        tenth = max(1, self.steps // 10)
        eval_every = tenth if self.config.eval_every is None else self.config.eval_every
        save_every = tenth if self.config.save_every is None else self.config.save_every
        self.model.train()
        bar = self._bar(_name(self.config), self.steps, "step", initial=self.done)
        with bar, stop_requests(deferred=self.folder is not None) as stop_requested:
            while self.done < self.steps:
                record = self._step(self.done + 1)
                self.done += 1
                self._record(record)
                bar.set_postfix_str(_summary(record), refresh=False)
                bar.update()
                if self.done == self.steps or (eval_every and self.done % eval_every == 0):
                    self._record(self._evaluate(self.done))
                if self.folder is None or self.done == self.steps:
                    continue
                if stop_requested() or (save_every and self.done % save_every == 0):
                    self._save()
                if stop_requested():
                    raise Interrupted(self.done, self.folder.path)
        self.model.eval()
        if self.folder is not None:
            self.model.save_pretrained(self.folder.model)
            self.tokenizer.save_pretrained(self.folder.model)
            self.folder.finish()
        evaluations = [_evaluation(record) for record in self.history if record["kind"] == "eval"]
        return AlignResult(self.model, self.history, evaluations[0], evaluations[-1], self.notes)


def resolve_device(name: str) -> str:
    """The device that "auto" means, or `name`; InputError where torch cannot use it."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch built without CUDA
        raise InputError(f"device '{name}' cannot be used ({str(error).splitlines()[0]})") from None
    return name


def _name(config: AlignConfig) -> str:
    return config.weighting if isinstance(config.weighting, str) else repr(config.weighting)


def _summary(record: Record) -> str:
    """Loss and weight of each objective, for the progress bar."""
    return ", ".join(f"{name} {loss:.3f} (w {record['weight'][name]:.2f})" for name, loss in record["loss"].items())


def _evaluation(record: Record) -> Evaluation:
    return Evaluation(**{k: record[k] for k in ("accuracy", "margin", "likelihood_accuracy", "pairs")})
