"""Align a language model with several preference objectives: the training loop, written as a user would write it.

In each step, every objective's loss is computed on its next pairs, `MultiObjectiveOptimizer` makes one direction of
their gradients, and AdamW steps along it. With several processes, each runs this loop on its share of every step's
pairs.

Files are left to `run_folder`, the numbers on held-out pairs to `scoring`, and how a model is spread over processes to
`engines`. What the loss of a pair is, and what has to be known about it beforehand, is said by a `PreferenceLoss`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

import mogeo
from mogeo.dpo.config import OPTIMIZER_OPTIONS
from mogeo.dpo.config import AlignConfig as AlignConfig
from mogeo.dpo.data import Preferences
from mogeo.dpo.engines import SingleProcess, make_engine
from mogeo.dpo.graceful_stop import Interrupted as Interrupted
from mogeo.dpo.graceful_stop import stop_requests
from mogeo.dpo.loss_names import resolve_loss
from mogeo.dpo.losses import BeforeTraining, PreferenceLoss
from mogeo.dpo.models import context_length, pad_token, prompt_format_for
from mogeo.dpo.processes import Processes, current_processes, device_of_rank, resolve_device
from mogeo.dpo.run_folder import Record, RunFolder, fingerprint
from mogeo.dpo.scoring import Evaluation, evaluate_preferences, score_sequences
from mogeo.dpo.tokens import ShuffledEpochs, TokenizedPreferences, TokenSequence, collate, tokenize_preferences
from mogeo.errors import InputError

logger = logging.getLogger("mogeo")

T = TypeVar("T")


@dataclass(frozen=True)
class AlignResult:
    """An aligned model, and what happened on the way.

    Attributes:
        model: the model that `align` was given. With `fsdp`, its parameters are DTensors.
        history: the records of metrics.jsonl, {"kind": "train" or "eval", "step": ..., ...}.
        before: numbers on the held-out pairs before the first step.
        after: the same after the last step.
        notes: what a reader of the results should know, such as how many pairs were left out.
    """

    model: Any
    history: list[Record]
    before: Evaluation
    after: Evaluation
    notes: list[str] = field(default_factory=list)


def check_settings(config: AlignConfig, objectives: Sequence[str] | None = None, ranks: int = 1) -> None:
    """Check all settings of a run, as far as that is possible without its model. Takes milliseconds.

    The weighting and the optimizer's options are tried on a model of a single number, so that whatever
    `MultiObjectiveOptimizer` refuses is refused here, in its words.

    Args:
        config: the settings.
        objectives: names of the objectives; None if they are not known yet.
        ranks: number of processes that train together.

    Raises:
        InputError: a setting is out of its range, or settings do not fit each other, the objectives or the ranks.
    """
    config.check()
    config.check_ranks(ranks)
    loss = resolve_loss(config.loss)
    if objectives is not None:
        loss = loss.for_objectives(objectives)
    if loss.one_process and ranks > 1:
        raise InputError(f"loss {loss!r} runs in a single process, and there are {ranks}: start mogeo align by itself")
    parameter = torch.nn.Parameter(torch.zeros(1))
    try:
        optimizer = _multi_objective(torch.optim.SGD([parameter]), config, objectives)
        if objectives is not None:
            steering = {name: getattr(config, name) for name in ("preference", "min_weight", "smoothing")}
            probe = mogeo.MultiObjectiveOptimizer(
                torch.optim.SGD([parameter]), config.weighting, objectives=objectives, **steering
            )
            probe.backward({name: parameter.sum() for name in objectives})
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from None
    if loss.reaches_zero and getattr(optimizer.weighting, "needs_positive_losses", False):
        raise InputError(
            f"weighting {optimizer.weighting!r} divides by the loss, and the {loss!r} loss reaches 0; use loss sigmoid "
            "or weighting mgda"
        )


def _multi_objective(
    base: torch.optim.Optimizer, config: AlignConfig, objectives: Sequence[str] | None
) -> mogeo.MultiObjectiveOptimizer:
    """The optimizer of a run, around a base optimizer."""
    options = {name: getattr(config, name) for name in OPTIMIZER_OPTIONS}
    options["row_dtype"] = {None: None, "bf16": torch.bfloat16}[config.row_dtype]
    return mogeo.MultiObjectiveOptimizer(
        base, config.weighting, objectives=objectives, max_grad_norm=config.max_grad_norm, **options
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
    """Fine-tune a model with one set of preference pairs per objective, balanced by `config.weighting`.

    The model is changed in place. As it is at the start, it is the reference model, whose log-probabilities are
    computed once, before the first step.

    With a `torch.distributed` process group of several ranks, call this on each of them with the same arguments. Each
    rank takes its share of every step's pairs, and the first one writes to `output`.

    Args:
        model: a causal language model of transformers. Its parameters should be fp32: smaller types round small updates
            away.
        tokenizer: its tokenizer.
        train: pairs to learn from. Their objectives, in this order, are those of the run.
        held_out: pairs to measure on, with the same objectives.
        config: the settings.
        output: folder for metrics, checkpoints and the final model; None: nothing is written.
        resume: go on from the checkpoint in `output`. The result has the same bits as that of a run that was never
            stopped; with another number of ranks it differs by rounding and dropout.
        progress: show progress bars on stderr.

    Raises:
        InputError: settings, data or folder cannot be used.
        Interrupted: the run was stopped by Ctrl-C or SIGTERM, and a checkpoint was saved in `output`. Without an
            `output`, KeyboardInterrupt is raised instead.
    """
    ranks = current_processes()
    check_settings(config, train.objectives, ranks.size)
    if set(train.objectives) != set(held_out.objectives):
        raise InputError(f"training pairs have objectives {train.objectives}, held-out pairs {held_out.objectives}")
    if resume and output is None:
        raise InputError("resume needs the output folder of the run to go on with")
    run = _Run(model, tokenizer, train, held_out, config, ranks, output, resume, progress)
    if resume:
        run.restore()
    else:
        run.begin()
    return run.train()


class _Run:
    """One run of `align`: model, optimizer, tokens, the reference's scores, and the records so far."""

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
        self.loss: PreferenceLoss = resolve_loss(config.loss).for_objectives(self.objectives)
        self.prepared = self._prepared(BeforeTraining(model, tokenizer, train, held_out, config, align))
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
        """Move the model to its device or spread it over the ranks, score the reference, and make the optimizer."""
        config = self.config
        key = "" if self.folder is None else self._reference_key()  # while each rank still holds the whole model
        self.engine: SingleProcess = make_engine(self.model, self.device, self.ranks, config.fsdp)
        self._score_reference(key)
        base = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            # One pass over the parameters; torch's default on the CPU is a Python loop, several times slower.
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.optimizer = _multi_objective(base, config, self.objectives)

    def _prepared(self, before: BeforeTraining) -> Mapping[str, Tensor]:
        """What the loss has to know about each training pair that is left, fp32 [n] by objective."""
        known = self.loss.prepare(before)
        return {name: values[self.train_set.kept[name]] for name, values in known.items()}

    def _note(self, text: str) -> None:
        """Log something that a reader of the results should know, and add it to the result's notes."""
        self.notes.append(text)
        if self.ranks.first:
            logger.warning(text)

    def _check_precision(self) -> None:
        """Note if parameters have a type in which small updates are lost."""
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
        """What has to stay the same when a run is resumed."""
        # These change where things are kept and how often the run is saved, and not what is computed.
        free = ("device", "fsdp", "host_rows", "save_every")
        settings = {k: v for k, v in self.config.to_dict().items() if k not in free}
        parts: list[Any] = []
        for tokens in (self.train_set, self.held_out):
            parts += [tokens.sequences, *(pairs.tolist() for pairs in tokens.pairs.values())]
        parts += [values.tolist() for values in self.prepared.values()]
        return {**settings, "objectives": list(self.objectives), "steps": self.steps, "data": fingerprint(*parts)}

    def _reference_key(self) -> str:
        """A fingerprint of all that the reference's scores depend on. The number of ranks does not change them."""
        settings = [self.config.autocast, self._score_batch, resolve_device(self.config.device)]
        return fingerprint(self.model, *self._scored(), settings)

    def _score_reference(self, key: str) -> None:
        """Score every sequence that the run will use, with the model as it is at the start.

        Args:
            key: fingerprint of what the scores depend on; scores that the folder holds under it are not computed again.
        """
        parts, sets, folder = ("training", "held-out"), self._scored(), self.folder

        def compute() -> list[Tensor]:
            return [self._score(sequences, f"reference, {part}") for part, sequences in zip(parts, sets, strict=True)]

        scores = self.ranks.on_first(lambda: None if folder is None else folder.cached_reference(key))
        if scores is None:  # each rank computes a part of the scores, and gets all of them
            scores = compute() if folder is None else folder.reference(key, compute)
        self.reference = torch.full((len(self.train_set.sequences),), torch.nan)
        self.reference[self._visited()] = scores[0]
        self.held_out_reference = scores[1]

    def _scored(self) -> tuple[list[TokenSequence], list[TokenSequence]]:
        """The sequences that the reference has to score: training and held-out ones."""
        return [self.train_set.sequences[i] for i in self._visited()], self.held_out.sequences

    def _visited(self) -> list[int]:
        """Indices of the training sequences that the run will use. A short run uses few of them."""
        steps = range(1, self.steps + 1)
        drawn = [self.train_set.pairs[name][order(step)] for name, order in self.order.items() for step in steps]
        return sorted(set(torch.cat(drawn).flatten().tolist()))

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step(self, step: int) -> Record:
        """Take one optimizer step, and return its record. The first step is 1."""
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
                # Callables, which the optimizer runs one at a time: only one objective's activations are in memory
                # then.
                self.optimizer.backward({name: self._loss_of(name, indices) for name, indices in micro_batch.items()})
            report = self.optimizer.combine()  # with sketches, this runs every loss once more
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
            "mean_cosines": told["mean_cosines"],
            "alignment": told["alignment"],
            "alignment_of": told["alignment_of"],
            "alignment_error": told["alignment_error"],
            "noise_scale": told["noise_scale"],
            "noise_scale_interval": told["noise_scale_interval"],
            "evidence": told["evidence"],
            "direction_norm": told["direction_norm"],
            "optimality_gap": told["optimality_gap"],
            "skipped": told["skipped"],
            "seconds": time.perf_counter() - started,
        }

    def _loss_of(self, name: str, indices: Tensor) -> Callable[[], Tensor]:
        """A function that computes what these pairs add to the objective's loss.

        Their losses are summed, and divided by the number of the objective's pairs in the step. Over all micro-batches
        that gives the mean over this rank's pairs, and the optimizer averages over ranks.
        """

        def loss() -> Tensor:
            flat = self.train_set.pairs[name][indices].T.flatten()  # all chosen, then all rejected
            batch = collate([self.train_set.sequences[i] for i in flat.tolist()], self.pad).to(self.device)
            with self.precision:
                scores = self.engine.log_probs(*batch)
            chosen, rejected = (scores - self.reference[flat].to(self.device)).chunk(2)
            prepared = self.prepared[name][indices].to(self.device) if name in self.prepared else None
            return self.loss(name, chosen - rejected, self.config.beta, prepared).sum() / self._pairs

        return loss

    @property
    def _pairs(self) -> int:
        """Number of pairs of each objective in a step on this rank."""
        return self.config.pairs_per_objective // self.ranks.size

    @property
    def _micro_batch(self) -> int:
        """Number of pairs that go through the model at once."""
        return self.config.micro_batch or self._pairs

    # ---- measuring ---------------------------------------------------------------------------------------------------

    @property
    def _score_batch(self) -> int:
        """Number of sequences that are scored at once. It does not depend on the number of ranks, nor do the scores."""
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
        """A progress bar of tqdm, short enough to leave room for numbers."""
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
        """Measure on the held-out pairs, after a step; 0: before the first one, when the policy is the reference."""
        policy = (
            self.held_out_reference if step == 0 else self._score(self.held_out.sequences, f"held-out, step {step}")
        )
        measured = evaluate_preferences(policy, self.held_out_reference, self.held_out, self.config.beta)
        return {"kind": "eval", "step": step, **measured.to_dict()}

    # ---- the run -----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start a new run: write its settings, and evaluate before the first step."""
        self._spread()
        self._seed()
        if self.folder is not None:
            self.folder.write_settings(self.settings)
        self._record(self._evaluate(0))

    def restore(self) -> None:
        """Go on with a run from its last checkpoint."""
        # A run of a version that could not track was not tracked, whatever the default has become.
        defaults = {**AlignConfig().to_dict(), "track": None}
        self._on_folder(lambda folder: folder.check_settings(self.settings, defaults))
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
        else:  # there are more ranks than when the checkpoint was saved
            self._seed()

    def _on_folder(self, act: Callable[[RunFolder], T]) -> T:
        """Let the first rank do something with the folder. All ranks get its result, or raise its InputError."""

        def on_mine() -> T:
            assert self.folder is not None
            return act(self.folder)

        return self.ranks.on_first(on_mine)

    def _seed(self) -> None:
        """Seed torch's generator, which only dropout uses, differently on each rank."""
        torch.manual_seed(self.config.seed + 1_000_003 * self.ranks.rank)

    def _save(self) -> None:
        """Write a checkpoint. All ranks have to call this, since each holds a part of it."""
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
        """Add a record to the history, and to metrics.jsonl."""
        self.history.append(record)
        if self.folder is not None:
            self.folder.append(record)

    def train(self) -> AlignResult:
        """Take the steps that are left, and write the final model."""
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
                # The signal reaches the ranks one after the other. All stop as soon as one has received it.
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


def _name(config: AlignConfig) -> str:
    """The weighting, for the progress bar."""
    return config.weighting if isinstance(config.weighting, str) else repr(config.weighting)


def _summary(record: Record) -> str:
    """Loss and weight of each objective, for the progress bar."""
    return ", ".join(f"{name} {loss:.3f} (w {record['weight'][name]:.2f})" for name, loss in record["loss"].items())


def _evaluation(record: Record) -> Evaluation:
    """The numbers of a record of kind "eval"."""
    return Evaluation(**{k: record[k] for k in ("accuracy", "margin", "likelihood_accuracy", "pairs")})
