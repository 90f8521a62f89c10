"""MultiObjectiveDPOTrainer: TRL's DPOTrainer with labels, a loss and a gradient per objective.

This file knows the training loop of TRL and Transformers. `trl_data` makes rows with labels, `trl_sampler` puts them in
order, `trl_losses` computes the losses, `mogeo.MultiObjectiveOptimizer` makes one direction of their gradients, and
`trl_metrics` collects what is logged.

The methods that are overridden are those in which one loss becomes several (`training_step`, `compute_loss`,
`create_optimizer`) and those that bring labels there. `trl_losses` lists what it takes for granted about TRL's loss.
Besides that, this file relies on these private parts of TRL:

- `_prepare_dataset(dataset, processing_class, args, name)`, called for every data set before it is tokenised;
- `_set_signature_columns_if_needed`, which fills the list `_signature_columns` of the columns that are kept;
- `_is_vision_dataset`, and `_compute_loss` itself;

and on these of Transformers: `_get_train_sampler` and `_prepare_inputs`. Our `training_step` replaces theirs, and does
the part of it that DPO on DDP and FSDP2 needs.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from trl import DPOTrainer

from mogeo import MultiObjectiveOptimizer, weightings
from mogeo.integrations.trl_data import LABELS, labelled_rows, merged_sets
from mogeo.integrations.trl_losses import ScoredPairs
from mogeo.integrations.trl_metrics import Tally
from mogeo.integrations.trl_sampler import StratifiedSampler
from mogeo.losses.named import checked_names
from mogeo.weightings import WeightingLike

logger = logging.getLogger(__name__)


class MultiObjectiveDPOTrainer(DPOTrainer):  # type: ignore[misc]  # TRL has no types
    """DPO with several objectives. Each has its own preferences, loss and gradient, which every step balances.

    ```python
    trainer = MultiObjectiveDPOTrainer(
        model="Qwen/Qwen2.5-0.5B-Instruct",
        args=DPOConfig("runs/aligned"),
        train_dataset=dataset,
        objectives=["helpfulness", "honesty"],
    )
    trainer.train()
    ```

    A micro-batch takes one forward and K backwards; weights are found once per optimizer step. The loss of an objective
    is that of DPOTrainer, whatever the `loss_type`, over the pairs that have a label for the objective, with the two
    answers swapped where it prefers "rejected". It is a mean over all those pairs in a step, in all micro-batches and
    ranks.

    Args:
        model: as in `DPOTrainer`. All other arguments of `DPOTrainer` can be given as well.
        objectives: names. Weights are in this order.
        weighting: a name (`mogeo.weightings.NAMES`) or a callable, as in `mogeo.MultiObjectiveOptimizer`.
        track: make weights, guarantee and logs follow the mean gradients in place of each step's noisy ones: the decay
            per step of the averages that estimate them, above 0.5 and below 1, or "auto"; as in
            `mogeo.MultiObjectiveOptimizer`.
        weigh_by: "mean", or "mini-batch": weights and guarantee go by each step's own gradients with `track` too, and
            logs alone tell of mean gradients.
        guarantee_descent: take the direction nearest to the weighting's that hurts no objective, to first order; as in
            `mogeo.MultiObjectiveOptimizer`.
        train_dataset: pairs (prompt, chosen, rejected) with one column of +1, 0 or −1 per objective; or a mapping from
            each objective to a Dataset of pairs; or UltraFeedback's rows (instruction, completions).
        eval_dataset: the same; or a mapping from other names to several such sets.
        optimizers: as in `DPOTrainer`. The optimizer is wrapped, unless it is a `MultiObjectiveOptimizer` with these
            objectives. In that case, its own weighting is used, and not `weighting`, and its own options.

    Raises:
        ValueError: the data does not fit (`mogeo.errors.InputError`), the weighting does not exist or does not suit the
            loss, `track` is a number that is no decay, `weigh_by` is neither of its two, or an option of DPOConfig does
            not work with several backwards over one forward.
        TypeError: `track` or `guarantee_descent` is of another type.
        NotImplementedError: the engine, or images, are not supported.
    """

    optimizer: Any
    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        *positional: Any,
        objectives: Sequence[str],
        weighting: WeightingLike = "mgda-decoupled",
        track: float | str | None = None,
        weigh_by: str = "mean",
        guarantee_descent: bool = False,
        **named: Any,
    ) -> None:
        self.objectives = checked_names(objectives)
        self.weighting = weightings.resolve(weighting)
        constant = getattr(self.weighting, "constant", None)
        if constant is not None:
            constant(len(self.objectives))  # raises if the number of weights is another
        self._options: dict[str, Any] = {"track": track, "weigh_by": weigh_by, "guarantee_descent": guarantee_descent}
        # Raises if an option cannot be. The optimizer of the run is made much later, in `create_optimizer`.
        MultiObjectiveOptimizer(torch.optim.SGD([nn.Parameter(torch.zeros(1))]), "uniform", **self._options)
        given = inspect.signature(DPOTrainer).bind(model, *positional, **named).arguments
        # TRL writes precomputed scores of the reference beside the file of the data, where the other ranks look for
        # them. So the data has to be in a file.
        self._on_disk: bool = getattr(given.get("args"), "precompute_ref_log_probs", False)
        for name, role in (("train_dataset", "train"), ("eval_dataset", "eval")):
            if name in given:
                given[name] = self._without_sets(given[name], role)
        own, _ = given.get("optimizers") or (None, None)
        if isinstance(own, MultiObjectiveOptimizer) and (track is not None or weigh_by != "mean" or guarantee_descent):
            raise ValueError(
                "the optimizer in `optimizers` has options of its own: hand track, weigh_by and guarantee_descent to "
                "that MultiObjectiveOptimizer, and not to the trainer"
            )
        if getattr(given.get("args"), "activation_offloading", False):
            raise ValueError(
                "activation_offloading=True brings activations back once, but each objective has a backward of its "
                "own: set it to False; gradient_checkpointing=True saves memory as well"
            )
        super().__init__(**given)
        self._fit_to_engine()
        self._refuse_what_does_not_fit()
        self.data_collator = _LabelCollator(self.data_collator)
        self._tally = Tally(self.objectives, self.accelerator.device)
        self._eval_tally = Tally(self.objectives, self.accelerator.device)
        self._labelled_in_step = [0.0] * len(self.objectives)  # of each objective, see `get_batch_samples`
        self._brought: set[int] = set()  # indices of the objectives that had a backward on this rank in this step

    def _refuse_what_does_not_fit(self) -> None:
        if set(self.loss_types) == {"hinge"} and getattr(self.weighting, "needs_positive_losses", False):
            raise ValueError(
                f"weighting {self.weighting!r} divides by the loss, and the hinge loss reaches 0: use another "
                "loss_type, or weighting='mgda'"
            )
        if self._is_vision_dataset:
            raise NotImplementedError("images are not supported: their rows cannot be taken apart by objective")

    def _fit_to_engine(self) -> None:
        if self.is_deepspeed_enabled:
            raise NotImplementedError("DeepSpeed keeps gradients to itself: use FSDP2 (fsdp_version: 2), or DDP")
        if self.is_fsdp_enabled and not self.accelerator.is_fsdp2:
            raise NotImplementedError("FSDP1 flattens parameters: use FSDP2 (fsdp_version: 2 in Accelerate's config)")
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise NotImplementedError("context and sequence parallelism are not supported: use FSDP2, or DDP")
        if self.is_fsdp_enabled:
            # Otherwise FSDP2 would add up the gradients of all objectives between micro-batches, before mogeo sees
            # them.
            self.accelerator.gradient_state.plugin_kwargs["sync_each_batch"] = True

    # ---- data --------------------------------------------------------------------------------------------------------

    def _without_sets(self, dataset: Any, role: str) -> Any:
        """The data, with each mapping from objectives to Datasets merged into one Dataset with labels."""
        if not isinstance(dataset, Mapping):
            return dataset
        if role == "train" or set(dataset) <= set(self.objectives):
            return merged_sets(dataset, self.objectives, role, on_disk=self._on_disk)
        return {name: self._without_sets(one, role) for name, one in dataset.items()}

    def _prepare_dataset(self, dataset: Any, processing_class: Any, args: Any, dataset_name: str) -> Any:
        chat = getattr(processing_class, "chat_template", None) is not None
        rows = labelled_rows(dataset, self.objectives, dataset_name, chat=chat, seed=args.seed, on_disk=self._on_disk)
        return super()._prepare_dataset(rows, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if LABELS not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, LABELS]

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """As in TRL, for batches that also have labels."""
        return super().compute_ref_log_probs(model, {key: inputs[key] for key in inputs if key != LABELS})

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """As in TRL, if all rows have labels for the same objectives; else an order that mixes rows evenly."""
        rows = self.train_dataset if train_dataset is None else train_dataset
        plain = super()._get_train_sampler(train_dataset)
        if not isinstance(rows, Dataset) or self.args.train_sampling_strategy != "random":
            return plain
        labels = rows[LABELS]
        kinds = [tuple(label != 0 for label in row) for row in labels]
        if len(set(kinds)) == 1:
            return plain
        per_step = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        for objective, has in zip(self.objectives, zip(*kinds, strict=True), strict=True):
            if sum(has) * per_step < len(kinds):
                logger.warning(
                    f"objective {objective!r} has {sum(has)} of {len(kinds)} pairs: with {per_step} pairs a step, some "
                    "steps do without it. Accumulate more micro-batches to have it in each"
                )
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return StratifiedSampler(kinds, seed, epoch=lambda: int(self.state.epoch or 0))

    # ---- a step ------------------------------------------------------------------------------------------------------

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """TRL's optimizer, wrapped in a `mogeo.MultiObjectiveOptimizer`."""
        super().create_optimizer(model)
        inner = _inner(self.optimizer)
        if isinstance(inner, MultiObjectiveOptimizer):
            if inner.objectives != self.objectives:
                raise ValueError(
                    f"the optimizer has the objectives {inner.objectives}, the trainer {self.objectives}: make it with "
                    f"MultiObjectiveOptimizer(..., objectives={list(self.objectives)})"
                )
        else:
            scaled = self.accelerator.scaler is not None
            self.optimizer = MultiObjectiveOptimizer(
                self.optimizer,
                self.weighting,
                objectives=self.objectives,
                nonfinite="propagate" if scaled else "skip",  # a GradScaler has to see infinite gradients
                **self._options,
            )
        optimizer: torch.optim.Optimizer = self.optimizer
        return optimizer

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The micro-batches of a step, as in Transformers.

        For each objective, also sum up the share of labelled pairs over all micro-batches and ranks of the step:
        `_training_losses` needs it for the mean.
        """
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        shares = [_labelled_shares(batch[LABELS]) for batch in batches]
        in_step = [sum(column) for column in zip(*shares, strict=True)] or [0.0] * len(self.objectives)
        if self.accelerator.num_processes > 1:
            local = torch.tensor(in_step, dtype=torch.float64, device=self.accelerator.device)
            in_step = self._sum_over_ranks(local).tolist()
        self._labelled_in_step = in_step
        self._brought = set()
        return batches, num_items

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """One forward, and one backward per objective; after a step's last micro-batch, write the shared direction.

        Args:
            model: as in Transformers.
            inputs: a micro-batch.
            num_items_in_batch: as in Transformers; not used.

        Returns:
            What the micro-batch adds to the loss that is logged, which is the mean over objectives.
        """
        with _unreduced(model):
            model.train()
            train_mode = getattr(self.optimizer, "train", None)
            if callable(train_mode):  # schedule-free optimizers
                train_mode()
            inputs = self._prepare_inputs(inputs)
            with self.compute_loss_context_manager():
                losses = self._training_losses(model, inputs)
            del inputs
            self._backward(losses)
        if self.accelerator.sync_gradients:
            # Not only in step(): before that, Trainer clips gradients, and callbacks may read them.
            scaler = self.accelerator.scaler
            scale = None if scaler is None else scaler.scale(torch.ones((), device=self.accelerator.device))
            self._tally.add_report(self._multi_objective_optimizer.combine(), scale)
            self._tally.share(self._sum_over_ranks)
        present = sum(share > 0 for share in self._labelled_in_step)
        logged = [loss.detach() for loss in losses.values()]
        return sum(logged, torch.zeros((), device=self.accelerator.device)) / max(1, present)

    def _training_losses(self, model: nn.Module, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """What this micro-batch adds to each objective's loss, which is a mean over the whole step and all ranks."""
        labels, pairs = self._scored(model, inputs)
        accumulation, ranks = self.current_gradient_accumulation_steps, self.accelerator.num_processes
        shares = _labelled_shares(labels)
        losses = {}
        for index, (objective, share) in enumerate(zip(self.objectives, shares, strict=True)):
            if share:
                column = [row[index] for row in labels]
                found = pairs.under(column)
                self._tally.add_pairs(index, round(share * len(labels)), (found.loss, found.accuracy, found.margin))
                # Trainer averages over micro-batches and ranks. That gives the mean over all labelled pairs only if
                # each micro-batch has the same share of them, so weigh each by its share. If all pairs have labels, the
                # factor is exactly 1, and the loss has the same bits as DPOTrainer's.
                factor = share * accumulation * ranks / self._labelled_in_step[index]
                losses[objective] = found.loss * factor / accumulation
            elif self._others_wait_for(index):
                losses[objective] = pairs.nothing()
            if objective in losses:
                self._brought.add(index)
        return losses

    def _others_wait_for(self, index: int) -> bool:
        """Whether other ranks wait for this one to run a backward of an objective for which it has no pairs."""
        if self.accelerator.num_processes == 1 or not self._labelled_in_step[index]:
            return False
        last = self.accelerator.sync_gradients
        return self.is_fsdp_enabled or (last and index not in self._brought)

    def _backward(self, losses: dict[str, Tensor]) -> None:
        """Run a backward for each loss."""
        optimizer, backward = self._multi_objective_optimizer, self.accelerator.backward
        if losses.keys() == set(self.objectives):
            optimizer.backward(losses, backward=backward)
            return
        for number, (objective, loss) in enumerate(losses.items(), start=1):
            optimizer.backward(loss, objective=objective, backward=backward, retain_graph=number < len(losses))

    @property
    def _multi_objective_optimizer(self) -> MultiObjectiveOptimizer:
        optimizer = _inner(self.optimizer)
        assert isinstance(optimizer, MultiObjectiveOptimizer)
        return optimizer

    def _scored(
        self, model: Callable[..., Any], inputs: dict[str, Any], return_outputs: bool = False
    ) -> tuple[list[list[int]], ScoredPairs]:
        """Run the forward of a batch; returns its labels, and its pairs with their scores."""
        rest = {key: inputs[key] for key in inputs if key != LABELS}
        return inputs[LABELS], ScoredPairs(self, super()._compute_loss, model, rest, return_outputs)

    # ---- evaluation and logs -----------------------------------------------------------------------------------------

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The mean of the losses of the objectives that have labels in this batch.

        Transformers calls this in evaluation. In training, `training_step` computes losses by itself.
        """
        labels, pairs = self._scored(model, inputs, return_outputs)
        losses = []
        for index in range(len(self.objectives)):
            column = [row[index] for row in labels]
            count = sum(label != 0 for label in column)
            if count:
                found = pairs.under(column)
                self._eval_tally.add_pairs(index, count, (found.loss, found.accuracy, found.margin))
                losses.append(found.loss)
        loss = torch.stack(losses).mean()
        return (loss, pairs.outputs) if return_outputs else loss

    def evaluate(self, eval_dataset: Any = None, *positional: Any, **named: Any) -> dict[str, float]:
        """As in TRL. The data may have all forms that `eval_dataset` may have in `__init__`."""
        metrics: dict[str, float] = super().evaluate(self._without_sets(eval_dataset, "eval"), *positional, **named)
        return metrics

    def evaluation_loop(self, dataloader: Any, *positional: Any, **named: Any) -> Any:
        """As in Transformers, with metrics of each objective. The loss is the mean of the objectives' losses."""
        self._eval_tally.reset()
        output = super().evaluation_loop(dataloader, *positional, **named)
        given = inspect.signature(super().evaluation_loop).bind(dataloader, *positional, **named)
        given.apply_defaults()
        prefix = given.arguments["metric_key_prefix"]
        self._eval_tally.share(self._sum_over_ranks)
        found = self._eval_tally.values()
        losses = [value for name, value in found.items() if name.startswith("loss/")]
        output.metrics[f"{prefix}_loss"] = sum(losses) / len(losses)
        output.metrics.update({f"{prefix}_{name}": value for name, value in found.items()})
        return output

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in TRL, with the metrics of each objective since the last call."""
        if self.model.training:
            logs.update(self._tally.values())
            self._tally.reset()
        super().log(logs, start_time)

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        total: Tensor = self.accelerator.reduce(values, reduction="sum")
        return total


@dataclass
class _LabelCollator:
    """A collator that adds the labels to a batch. They stay lists, since only the host needs them.

    Attributes:
        pairs: TRL's collator.
    """

    pairs: Callable[[list[dict[str, Any]]], dict[str, Any]]

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self.pairs(rows), LABELS: [list(row[LABELS]) for row in rows]}


def _labelled_shares(labels: Sequence[Sequence[int]]) -> list[float]:
    """For each objective, the share of these pairs that have a label for it."""
    return [sum(label != 0 for label in column) / len(labels) for column in zip(*labels, strict=True)]


def _inner(optimizer: Any) -> Any:
    """The optimizer inside Accelerate's wrappers."""
    while isinstance(optimizer, AcceleratedOptimizer):
        optimizer = optimizer.optimizer
    return optimizer


@contextlib.contextmanager
def _unreduced(model: nn.Module) -> Iterator[None]:
    """A context in which DDP does not reduce gradients: it expects one backward per forward, and here there are
    several.

    mogeo averages them over ranks instead, once per step.
    """
    with model.no_sync() if isinstance(model, DistributedDataParallel) else contextlib.nullcontext():
        yield
