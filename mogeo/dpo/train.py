"""Align a language model with several preference objectives: the training loop, written as a user would write it.

One step: for every objective, the DPO loss of its next pairs; `MultiObjectiveOptimizer` turns their gradients into one
direction; AdamW takes it. Files are the business of `run_folder`, the numbers on held-out pairs that of `scoring`, how
a model lies on several ranks that of `engines`. Every rank runs this loop, on its share of each step's pairs.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import mogeo
from mogeo.decide.steering import Steering
from mogeo.dpo.config import OPTIMIZER_OPTIONS
from mogeo.dpo.config import AlignConfig as AlignConfig
from mogeo.dpo.data import Preferences
from mogeo.dpo.engines import SingleProcess, make_engine
from mogeo.dpo.graceful_stop import Interrupted as Interrupted
from mogeo.dpo.graceful_stop import stop_requests
from mogeo.dpo.losses import dpo_loss, modpo_loss
from mogeo.dpo.models import context_length, pad_token, prompt_format_for
from mogeo.dpo.processes import Processes, current_processes, device_of_rank
from mogeo.dpo.processes import resolve_device as resolve_device
from mogeo.dpo.run_folder import Record, RunFolder, fingerprint
from mogeo.dpo.scoring import Evaluation, evaluate_preferences, score_sequences
from mogeo.dpo.tokens import ShuffledEpochs, TokenizedPreferences, TokenSequence, collate, tokenize_preferences
from mogeo.errors import InputError
from mogeo.losses.named import in_order

logger = logging.getLogger("mogeo")

T = TypeVar("T")


@dataclass(frozen=True)
class AlignResult:
    """An aligned model, and what happened on the way."""

    model: Any
    """The model that came in; with fsdp its parameters are DTensors."""
    history: list[Record]
    """The records of metrics.jsonl: {"kind": "train" | "eval", "step": ..., ...}."""
    before: Evaluation
    after: Evaluation
    notes: list[str] = field(default_factory=list)
    """What the reader of the results should know: pairs left out, a prompt format that was not the one asked for."""


def check_weighting(config: AlignConfig, objectives: Sequence[str] | None = None) -> None:
    """Raise InputError for a weighting that does not exist, or cannot work with this loss or these objectives.

    So too for what steers it: a preference or a floor that does not fit the objectives.
    """
    try:
        weighting = mogeo.weightings.resolve(config.weighting)
        if objectives is not None:
            preference = None if config.preference is None else in_order(config.preference, tuple(objectives))
            Steering(preference, config.min_weight, config.smoothing).constant(weighting, len(objectives))
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

    With a `torch.distributed` process group of several ranks, call this on each of them, with the same arguments: they
    share every step's pairs out, and the first rank writes to `output`.

    Args:
        model: a causal language model of transformers; fp32 parameters, unless updates may be rounded away.
        tokenizer: its tokenizer.
        train: preferences to learn from; their objectives are the run's, in this order.
        held_out: preferences to measure on, with the same objectives.
        config: everything else.
        output: folder for metrics, checkpoints and the final model; None: nothing is written.
        resume: go on from the checkpoint in `output`; the result is bit-identical to that of an uninterrupted run (on
            another number of ranks: equal but for rounding, and for dropout).
        progress: show progress bars on stderr.

    Raises:
        InputError: settings, data or folder cannot be used.
        Interrupted: Ctrl-C or SIGTERM, with an `output`; without one, KeyboardInterrupt comes through.
    """
    ranks = current_processes()
    config.check()
    config.check_ranks(ranks.size)
    check_weighting(config, train.objectives)
    if set(train.objectives) != set(held_out.objectives):
        raise InputError(f"training pairs have objectives {train.objectives}, held-out pairs {held_out.objectives}")
    if config.modpo_weights is not None and len(config.modpo_weights) != len(train.objectives):
        raise InputError(
            f"modpo_weights has {len(config.modpo_weights)} entries for {len(train.objectives)} objectives"
        )
    if resume and output is None:
        raise InputError("resume needs the output folder of the run to go on with")
    run = _Run(model, tokenizer, train, held_out, config, ranks, output, resume, progress)
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
        ranks: Processes,
        output: Path | None,
        resume: bool,
        progress: bool,
    ) -> None:
        self.config, self.tokenizer, self.ranks = config, tokenizer, ranks
        self.output, self.progress = output, progress and ranks.first
        self.folder = self._open_folder(resume)
        self.device = device_of_rank(config.device, ranks)
        self.model = model
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
        ranks.check_agreed(self.settings)
        self.done = 0
        self.history: list[Record] = []

    # ---- preparation -------------------------------------------------------------------------------------------------

    def _open_folder(self, resume: bool) -> RunFolder | None:
        """The output folder, for the rank that writes."""
        opened: list[RunFolder] = []
        if self.output is not None:
            output = self.output
            self.ranks.on_first(lambda: opened.append(RunFolder(output, resume)))
        return opened[0] if opened else None

    def _spread(self) -> None:
        """Put the model in its place, score the reference with it, and make the optimizer of what lies there."""
        config = self.config
        key = "" if self.folder is None else self._reference_key()  # of the whole model
        self.engine: SingleProcess = make_engine(self.model, self.device, self.ranks, config.fsdp)
        self._score_reference(key)
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
            **_optimizer_options(config),
        )

    def _note(self, text: str) -> None:
        self.notes.append(text)
        if self.ranks.first:
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
        # Where it runs, where rows lie and how often it saves do not change what is computed.
        free = ("device", "fsdp", "host_rows", "release_rows", "save_every")
        settings = {k: v for k, v in self.config.to_dict().items() if k not in free}
        parts: list[Any] = []
        for tokens in (self.train_set, self.held_out):
            parts += [tokens.sequences, *(pairs.tolist() for pairs in tokens.pairs.values())]
        if self.config.modpo_weights is not None:
            parts += [margins.tolist() for margins in self.train_set.margins.values()]
        return {**settings, "objectives": list(self.objectives), "steps": self.steps, "data": fingerprint(*parts)}

    def _reference_key(self) -> str:
        """Fingerprint of all that the reference's scores depend on; the number of ranks is not among it."""
        settings = [self.config.autocast, self._score_batch, resolve_device(self.config.device)]
        return fingerprint(self.model, *self._scored(), settings)

    def _score_reference(self, key: str) -> None:
        """Score what the run will see with the model as it came in; from the cache where nothing relevant changed."""
        parts, sets, folder = ("training", "held-out"), self._scored(), self.folder

        def compute() -> list[Tensor]:
            return [self._score(sequences, f"reference, {part}") for part, sequences in zip(parts, sets, strict=True)]

        scores = self.ranks.on_first(lambda: None if folder is None else folder.cached_reference(key))
        if scores is None:  # every rank computes a part, and has all of them then
            scores = compute() if folder is None else folder.reference(key, compute)
        self.reference = torch.full((len(self.train_set.sequences),), torch.nan)
        self.reference[self._visited()] = scores[0]
        self.held_out_reference = scores[1]

    def _scored(self) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """What the reference has to score: training and held-out sequences."""
        return [self.train_set.sequences[i] for i in self._visited()], self.held_out.sequences

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
        drawn = {
            name: torch.split(self.ranks.share(order(step)), self._micro_batch) for name, order in self.order.items()
        }
        self.optimizer.zero_grad()
        micro_batches = [dict(zip(drawn, parts, strict=True)) for parts in zip(*drawn.values(), strict=True)]
        with self.engine.reducing(len(micro_batches) * (1 if config.sketch is None else 2)):
            for micro_batch in micro_batches:
                # Callables: the optimizer runs them one at a time, so that one objective's activations are in memory.
                self.optimizer.backward({name: self._loss_of(name, indices) for name, indices in micro_batch.items()})
            report = self.optimizer.combine()  # with sketches, the losses run for a second time
        self.optimizer.step()
        told = report.to_dict()
        return {
            "kind": "train",
            "step": step,
            "learning_rate": rate,
            "loss": told["losses"],
            "weight": told["weights"],
            "age": told["age"],
            "grad_norm": told["grad_norms"],
            "cosines": told["cosines"],
            "alignment": told["alignment"],
            "direction_norm": told["direction_norm"],
            "optimality_gap": told["optimality_gap"],
            "skipped": told["skipped"],
            "seconds": time.perf_counter() - started,
        }

    def _loss_of(self, name: str, indices: Tensor) -> Callable[[], Tensor]:
        """The share of these pairs in the objective's mean loss over the step.

        Micro-batches add up to the mean over this rank's pairs, and the optimizer averages over ranks.
        """

        def loss() -> Tensor:
            flat = self.train_set.pairs[name][indices].T.flatten()  # all chosen, then all rejected
            batch = collate([self.train_set.sequences[i] for i in flat.tolist()], self.pad).to(self.device)
            with self.precision:
                scores = self.engine.log_probs(*batch)
            chosen, rejected = (scores - self.reference[flat].to(self.device)).chunk(2)
            return self._pair_losses(name, indices, chosen - rejected).sum() / self._pairs

        return loss

    def _pair_losses(self, name: str, indices: Tensor, margins: Tensor) -> Tensor:
        """The loss of each of an objective's pairs, from its margin h, [n]."""
        config = self.config
        if config.modpo_weights is None:
            return dpo_loss(margins, config.beta, config.loss, config.label_smoothing)
        weight = config.modpo_weights[self.objectives.index(name)]
        return modpo_loss(margins, self.train_set.margins[name][indices].to(self.device), config.beta, weight)

    @property
    def _pairs(self) -> int:
        """Pairs of an objective in a step, on this rank."""
        return self.config.pairs_per_objective // self.ranks.size

    @property
    def _micro_batch(self) -> int:
        return self.config.micro_batch or self._pairs

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @property
    def _score_batch(self) -> int:
        # Sequences; without gradients they take less memory than in training. However many ranks there are, the batches
        # are the same, and with them the scores, bit for bit.
        return 2 * (self.config.micro_batch or self.config.pairs_per_objective)

    def _score(self, sequences: list[TokenSequence], label: str) -> Tensor:
        with self._bar(label, len(sequences), "seq", leave=False) as bar:
            return score_sequences(
                self.model,
                sequences,
                batch_size=self._score_batch,
                pad=self.pad,
                precision=self.precision,
                on_batch=bar.update,
                log_probs=self.engine.log_probs,
                ranks=self.ranks,
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
        measured = evaluate_preferences(policy, self.held_out_reference, self.held_out, self.config.beta)
        return {"kind": "eval", "step": step, **measured.to_dict()}

    # ---- the run -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start from step 0."""
        self._spread()
        self._seed()
        if self.folder is not None:
            self.folder.write_settings(self.settings)
        self._record(self._evaluate(0))

    def restore(self) -> None:
        """Go back to the last checkpoint."""
        self._on_folder(lambda folder: folder.check_settings(self.settings, AlignConfig().to_dict()))
        self._spread()
        read: Record = {"model": {}, "optimizer": {}}

        def begin_reading(folder: RunFolder) -> tuple[int, list[Any], list[Record]]:
            read.update(folder.load_checkpoint())
            return read["step"], read["random"], folder.rewind(read["step"])

        self.done, random, self.history = self._on_folder(begin_reading)
        self.engine.load(self.optimizer, read["model"], read["optimizer"])
        if self.ranks.rank < len(random):
            cpu, cuda = random[self.ranks.rank]
            torch.set_rng_state(cpu)
            if cuda is not None and self.device.type == "cuda":
                torch.cuda.set_rng_state(cuda, self.device)
        else:  # there are more ranks than before
            self._seed()

    def _on_folder(self, act: Callable[[RunFolder], T]) -> T:
        """Let the rank that has the folder do something with it; all get the result, or the InputError."""

        def on_mine() -> T:
            assert self.folder is not None
            return act(self.folder)

        return self.ranks.on_first(on_mine)

    def _seed(self) -> None:
        """Seed dropout, the one thing that draws from torch's generator: other masks on every rank."""
        torch.manual_seed(self.config.seed + 1_000_003 * self.ranks.rank)

    def _save(self) -> None:
        """Write a checkpoint. Every rank holds a part of it."""
        cuda = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        state = {
            "step": self.done,
            "model": self.engine.weights(),
            "optimizer": self.engine.optimizer_state(self.optimizer),
            "random": self.ranks.gather([torch.get_rng_state(), cuda]),
        }
        if self.folder is not None:
            self.folder.save_checkpoint(state)

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
        with bar, stop_requests(deferred=self.output is not None) as stop_requested:
            while self.done < self.steps:
                record = self._step(self.done + 1)
                self.done += 1
                self._record(record)
                bar.set_postfix_str(_summary(record), refresh=False)
                bar.update()
                if self.done == self.steps or (eval_every and self.done % eval_every == 0):
                    self._record(self._evaluate(self.done))
                if self.output is None or self.done == self.steps:
                    continue
                # A launcher tells its ranks one after the other: all stop once one has heard of it.
                stop = self.ranks.any(stop_requested())
                if stop or (save_every and self.done % save_every == 0):
                    self._save()
                    stop = self.ranks.any(stop_requested())
                if stop:
                    raise Interrupted(self.done, self.output)
        self.model.eval()
        weights = self.engine.weights()
        if self.folder is not None:
            self.model.save_pretrained(self.folder.model, state_dict=weights)
            self.tokenizer.save_pretrained(self.folder.model)
            self.folder.finish()
        evaluations = [_evaluation(record) for record in self.history if record["kind"] == "eval"]
        return AlignResult(self.model, self.history, evaluations[0], evaluations[-1], self.notes)


def _optimizer_options(config: AlignConfig) -> dict[str, Any]:
    """The settings that go to the optimizer as they are, but for names of dtypes."""
    options = {name: getattr(config, name) for name in OPTIMIZER_OPTIONS}
    return {**options, "row_dtype": {None: None, "bf16": torch.bfloat16}[config.row_dtype]}


def _name(config: AlignConfig) -> str:
    return config.weighting if isinstance(config.weighting, str) else repr(config.weighting)


def _summary(record: Record) -> str:
    """Loss and weight of each objective, for the progress bar."""
    return ", ".join(f"{name} {loss:.3f} (w {record['weight'][name]:.2f})" for name, loss in record["loss"].items())


def _evaluation(record: Record) -> Evaluation:
    return Evaluation(**{k: record[k] for k in ("accuracy", "margin", "likelihood_accuracy", "pairs")})
