"""How much memory a model's forward and backward take, measured on tensors without data. Knows no objectives.

Tensors are torch's fake tensors, which have a shape and no data. They pass for CPU tensors, so that autocast and the
choice of an attention kernel are as on a CPU. A dispatch mode watches which storages are alive. The computation is that
of `mogeo align` (`mogeo.dpo.log_probs` and `mogeo.dpo.losses`), with the same chunks of logits and with the masks of a
padded batch.
"""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from mogeo.dpo.log_probs import sequence_log_probs, split_head
from mogeo.dpo.losses import dpo_loss
from mogeo.dpo.models import check_model_source
from mogeo.errors import InputError
from mogeo.plan.memory import Peaks, Shape

Precision = Literal["autocast", "fp32", "bf16", "mixed"]

_FEW, _MORE, _CHECKED = 2, 3, 4  # layers; at least 2, so that the first layer is not also the last
_LINEAR = 0.01  # by how much the peak with `_CHECKED` layers may differ from the line through the other two
# The layers between the last and the first need no phase of their own: memory changes evenly from one to the other.
_PHASES = ("forward", "head", "last layer", "first layer", "embedding")

aten = torch.ops.aten


@dataclass(frozen=True)
class Trace:
    """What one forward and one backward of a micro-batch take.

    Attributes:
        peaks: bytes, without weights, optimizer state and rows.
        forward: floating-point operations of the forward's matrix products and attention.
        backward: those of the backward, including what is recomputed there.
    """

    peaks: Peaks
    forward: float
    backward: float


def read_config(source: str) -> Any:
    """Read the configuration of a model.

    Args:
        source: hub name, folder, GGUF file, or a file like `config.json`.

    Raises:
        InputError: there is none, or it is not that of a language model.
    """
    import transformers

    path = Path(source)
    if path.suffix != ".json" or not path.is_file():
        check_model_source(source)
    place, options = (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (source, {})
    try:
        config = transformers.AutoConfig.from_pretrained(place, **options)
    except Exception as error:  # the hub, damaged files and unknown architectures raise errors of many types
        raise InputError(f"model '{source}': its configuration cannot be read ({_reason(error)})") from error
    if not isinstance(getattr(config, "num_hidden_layers", None), int):
        raise InputError(
            f"model '{source}' is a {config.model_type}, whose config does not say how many layers it has "
            "(num_hidden_layers): name the language model's own config"
        )
    return config


def outline(config: Any) -> Shape:
    """Count the parameters and buffers of a model, which is built on the meta device. Tied parameters count once.

    Args:
        config: of the model.

    Raises:
        InputError: the configuration is no causal language model's.
    """
    with torch.device("meta"):
        model = _build(config, torch.float32)
    layers = _layers_of(model, config)
    held = {id(p) for layer in layers for p in layer.parameters()}
    return Shape(
        elements=sum(p.numel() for p in model.parameters()),
        buffer_bytes=sum(b.numel() * b.element_size() for b in model.buffers()),
        layers=len(layers),
        layer_elements=max(sum(p.numel() for p in layer.parameters()) for layer in layers),
        outer_elements=sum(p.numel() for p in model.parameters() if id(p) not in held),
        lora_elements=sum(
            m.in_features + m.out_features for layer in layers for m in layer.modules() if isinstance(m, nn.Linear)
        ),
    )


def trace(
    config: Any,
    *,
    sequences: int,
    tokens: int,
    precision: Precision,
    checkpointing: bool,
    autocast_cache: bool = True,
) -> Trace:
    """Measure one micro-batch of one objective.

    A model of more than 4 layers is run with 2 and with 3 of them. In each phase of a step, memory grows linearly with
    the number of layers, so that these two give the figures of the whole model. A run with 4 layers checks that; if it
    does not hold, because layers differ, the whole model is run.

    Args:
        config: of the model.
        sequences: B, sequences of the micro-batch, two per pair.
        tokens: T, tokens of a sequence. All are taken to be scored, which gives an upper bound.
        precision: "autocast": fp32 weights under bf16 autocast; "fp32" or "bf16": both weights and products; "mixed":
            the layers see bf16 only, so this is the same as "bf16".
        checkpointing: whether each layer is checkpointed.
        autocast_cache: whether autocast keeps its bf16 copies of weights until the forward ends, as it does by default.

    Raises:
        InputError: the model cannot be run without data, or does not take so many tokens.
    """
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context and tokens > context:
        raise InputError(f"{tokens} tokens are more than the {context} that the model attends to; lower --tokens")

    def run(layers: int) -> _Live:
        try:
            return _run(config, layers, sequences, tokens, precision, checkpointing, autocast_cache)
        except Exception as error:  # a model that needs data can fail in any way
            raise InputError(
                f"a {config.model_type} model cannot be run on shapes alone, so its activations are not known "
                f"({_reason(error)})"
            ) from error

    whole: int = config.num_hidden_layers
    if whole <= _CHECKED:
        return _summary(run(whole))
    few, more, checked = run(_FEW), run(_MORE), run(_CHECKED)
    found, expected = _summary(checked), _extrapolated(few, more, _CHECKED)
    for one, other in ((found.peaks.streamed, expected.peaks.streamed), (found.peaks.kept, expected.peaks.kept)):
        if abs(one - other) > _LINEAR * one:
            return _summary(run(whole))
    return _extrapolated(few, more, whole)


def _summary(live: _Live) -> Trace:
    return Trace(
        Peaks(max(live.streamed.values()), max(live.kept.values())),
        live.flops["forward"],
        sum(live.flops.values()) - live.flops["forward"],
    )


def _extrapolated(few: _Live, more: _Live, layers: int) -> Trace:
    """From measurements with `_FEW` and `_MORE` layers to a number of layers.

    Each phase is extrapolated by itself, and only then the largest is taken: the largest of several lines is no line.
    """

    def at(one: float, other: float) -> float:
        return one + (other - one) * (layers - _FEW) / (_MORE - _FEW)

    one, other = _summary(few), _summary(more)
    return Trace(
        Peaks(
            int(max(at(few.streamed[phase], more.streamed[phase]) for phase in _PHASES)),
            int(max(at(few.kept[phase], more.kept[phase]) for phase in _PHASES)),
        ),
        at(one.forward, other.forward),
        at(one.backward, other.backward),
    )


# ---- the model -------------------------------------------------------------------------------------------------------


def _build(config: Any, dtype: torch.dtype) -> Any:
    import transformers

    try:
        return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except Exception as error:
        raise InputError(
            f"a {config.model_type} model cannot be built as a causal language model ({_reason(error)})"
        ) from error


def _layers_of(model: nn.Module, config: Any) -> nn.ModuleList:
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers:
            return module
    raise InputError(
        f"{type(model).__name__} has no list of its {config.num_hidden_layers} layers, which a plan counts by"
    )


def _with_layers(config: Any, layers: int) -> Any:
    shorter = copy.deepcopy(config)
    shorter.num_hidden_layers = layers
    if getattr(shorter, "layer_types", None):
        shorter.layer_types = shorter.layer_types[:layers]
    return shorter


def _run(
    config: Any,
    layers: int,
    sequences: int,
    tokens: int,
    precision: Precision,
    checkpointing: bool,
    autocast_cache: bool,
) -> _Live:
    """Run the forward and backward of the DPO loss on one micro-batch of sequences without padding."""
    shorter = _with_layers(config, layers)
    with FakeTensorMode():
        model = _build(shorter, torch.bfloat16 if precision in ("bf16", "mixed") else torch.float32).train()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # newer transformers have renamed this argument
                model.gradient_checkpointing_enable({"use_reentrant": False})
        ids = torch.zeros(sequences, tokens, dtype=torch.int64)
        mask = torch.ones(sequences, tokens, dtype=torch.bool)
        reference = torch.zeros(sequences)
        live = _Live([*model.parameters(), *model.buffers(), ids, mask, reference], (sequences, tokens - 1))
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(live.complete)
        _mark_phases(_layers_of(model, shorter), live.enter)
        with live:
            with live.answering():
                split_head(model)  # compares logits, which have no data here; `answering` lets the comparison hold
            live.enter("forward")
            autocast = precision == "autocast"
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast, cache_enabled=autocast_cache):
                scores = sequence_log_probs(model, ids, mask, mask)
            chosen, rejected = (scores - reference).chunk(2)
            loss = dpo_loss(chosen - rejected, 0.1).sum()
            del scores, chosen, rejected
            live.enter("head")
            loss.backward()  # type: ignore[no-untyped-call]
    return live


def _mark_phases(layers: nn.ModuleList, enter: Callable[[str], None]) -> None:
    """Call `enter` when the backward reaches the last layer, leaves it, reaches the first layer, and leaves it."""

    def watch(tensor: Any, phase: str) -> None:
        tensor = tensor if isinstance(tensor, Tensor) else tensor[0]
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: enter(phase))

    def after(phase: str) -> Callable[..., None]:
        return lambda module, args, output: watch(output, phase)

    def before(module: nn.Module, args: Any, kwargs: Any) -> None:
        watch(args[0] if args else kwargs["hidden_states"], "embedding")

    layers[-1].register_forward_hook(after("last layer"))
    if len(layers) > 2:
        layers[-2].register_forward_hook(after("layers between"))
    if len(layers) > 1:
        layers[0].register_forward_hook(after("first layer"))
    layers[0].register_forward_pre_hook(before, with_kwargs=True)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text:.300}"


# ---- the watch -------------------------------------------------------------------------------------------------------


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the storages that are alive, phase by phase.

    Args:
        held: tensors that are there from the start, and do not count.
        scored: shape of the mask of scored tokens. All its entries are True, so that its count is known without data.

    Attributes:
        streamed: phase -> most bytes, if each gradient is moved away as soon as it is complete.
        kept: phase -> most bytes, if gradients stay until the backward ends.
        flops: phase -> floating-point operations.
    """

    def __init__(self, held: list[Tensor], scored: tuple[int, int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.streamed: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self.flops: dict[str, float] = {}
        self._held = {id(tensor.untyped_storage()): tensor for tensor in held}
        self._bytes: dict[int, int] = {}
        self._now = self._complete = 0
        self._scored = torch.Size(scored)
        self._answers = False
        self.enter("seam")

    def enter(self, phase: str) -> None:
        """Begin a phase."""
        self._phase = phase
        if phase == "forward":  # forget what was counted before the step
            self.streamed, self.kept, self.flops = {}, {}, {}
        self.flops.setdefault(phase, 0.0)
        self._note()

    def complete(self, parameter: Tensor) -> None:
        """The gradient of a parameter is complete, and would be moved to its row: free it."""
        assert parameter.grad is not None
        self._complete += parameter.grad.untyped_storage().nbytes()
        parameter.grad = None

    @contextmanager
    def answering(self) -> Iterator[None]:
        """Within this context, every question about data, such as whether x < y, is answered with True."""
        self._answers = True
        try:
            yield
        finally:
            self._answers = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, count what it computes, and watch the storages of what comes out."""
        kwargs = kwargs or {}
        out = self._out(func, args, kwargs)
        count = flop_registry.get(func.overloadpacket)
        if count is not None:
            self.flops[self._phase] += count(*args, **kwargs, out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._watch(tensor)
        return out

    def _out(self, func: Any, args: Any, kwargs: Any) -> Any:
        if func is aten._local_scalar_dense.default and self._answers:
            return True
        # The size of these results depends on the number of scored tokens, which is known although the mask has no
        # data.
        if func is aten.index.Tensor and len(args[1]) == 1 and self._is_scored(args[1][0]):
            return args[0].new_empty((self._scored.numel(), *args[0].shape[2:]))
        if func is aten.masked_select.default and self._is_scored(args[1]):
            return args[0].new_empty((self._scored.numel(),))
        # Autograd adds up gradients in place, but not under a dispatch mode such as this one. Do as it would.
        if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
            if func is aten.add.Tensor and _fits(args[0], args[1]):
                return aten.add_.Tensor(*args, **kwargs)
            if func is aten.index_put.default:
                return aten.index_put_.default(*args, **kwargs)
        return func(*args, **kwargs)

    def _is_scored(self, mask: Any) -> bool:
        return isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == self._scored

    def _watch(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = id(storage)
        if key in self._held or key in self._bytes:
            return
        self._bytes[key] = storage.nbytes()
        self._now += storage.nbytes()
        weakref.finalize(storage, self._forget, key)
        self._note()

    def _forget(self, key: int) -> None:
        self._now -= self._bytes.pop(key)

    def _note(self) -> None:
        phase = self._phase
        self.streamed[phase] = max(self.streamed.get(phase, 0), self._now)
        self.kept[phase] = max(self.kept.get(phase, 0), self._now + self._complete)


def _fits(one: Any, other: Any) -> bool:
    return isinstance(other, Tensor) and one.shape == other.shape and one.dtype == other.dtype and one.is_contiguous()
