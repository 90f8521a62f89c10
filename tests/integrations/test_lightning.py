"""Lightning trains with the optimizer as its users write it: manual optimization, and whatever hangs on it.

`self.optimizers()` returns a proxy whose class inherits from the optimizer's. Each run is held against a plain loop.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import DataLoader

from mogeo import MultiObjectiveOptimizer

pytestmark = [
    # Lightning's own: its advice about loaders, and what of torch it calls under older names.
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec:FutureWarning"),
]

Step = Callable[["Module", Any, Tensor], None]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Say nothing about the hardware."""
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(level)


def make_net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))


def losses_of(net: Callable[[Tensor], Tensor], batch: Tensor) -> dict[str, Tensor]:
    out = net(batch)
    return {"left": (out[:, 0] - 1).square().mean() + 0.1, "right": (out[:, 1] + 2).square().mean() + 0.1}


def batches() -> Tensor:
    """[40, 6]: five batches of eight."""
    return torch.randn(40, 6, generator=torch.Generator().manual_seed(1))


def make_optimizer(net: nn.Module, several: bool = False, **options: Any) -> MultiObjectiveOptimizer:
    """AdamW for all parameters, or Muon for matrices and AdamW for the rest."""
    if not several:
        return MultiObjectiveOptimizer(torch.optim.AdamW(net.parameters(), lr=0.01), **options)
    matrices, others = ([p for p in net.parameters() if (p.ndim == 2) is is_matrix] for is_matrix in (True, False))
    return MultiObjectiveOptimizer([torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=0.01)], **options)


class Module(lightning.LightningModule):
    """Trains by `step(module, what self.optimizers() returned, batch)`."""

    def __init__(self, step: Step, **options: Any) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.net = make_net()
        self.step_once, self.options = step, options

    def training_step(self, batch: Tensor, index: int) -> None:
        self.step_once(self, self.optimizers(), batch)

    def configure_optimizers(self) -> Any:
        self.made = make_optimizer(self.net, **self.options)
        return self.made


def two_lines(module: Module, optimizer: Any, batch: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses_of(module.net, batch))
    optimizer.step()


def by_manual_backward(module: Module, optimizer: Any, batch: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses_of(module.net, batch), backward=module.manual_backward)
    optimizer.step()


def fit(module: lightning.LightningModule, epochs: int = 2, ckpt_path: Path | None = None, **options: Any) -> Any:
    quietly = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    options = {"accelerator": "cpu", "enable_checkpointing": False, **quietly, **options}
    trainer = lightning.Trainer(max_epochs=epochs, **options)
    trainer.fit(module, DataLoader(batches(), batch_size=8), ckpt_path=ckpt_path)
    return trainer


def plain_loop(step: Callable[[nn.Module, Any, Tensor], None], steps: int = 10, **options: Any) -> nn.Module:
    net = make_net()
    optimizer = make_optimizer(net, **options)
    for k in range(steps):
        step(net, optimizer, batches().split(8)[k % 5])
    return net


def plain_step(net: nn.Module, optimizer: Any, batch: Tensor) -> None:
    optimizer.zero_grad()
    optimizer.backward(losses_of(net, batch))
    optimizer.step()


def assert_equal_nets(a: nn.Module, b: nn.Module) -> None:
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("options", [{}, {"sketch": 64}, {"refresh_every": 3}, {"several": True}], ids=str)
@pytest.mark.parametrize("step", [two_lines, by_manual_backward])
def test_manual_optimization_is_a_plain_loop(step: Step, options: dict[str, Any]) -> None:
    module = Module(step, **options)
    fit(module)
    assert_equal_nets(module.net, plain_loop(plain_step, **options))


def test_what_is_read_and_set_on_the_proxy_is_the_optimizers() -> None:
    seen: list[Any] = []

    def step(module: Module, optimizer: Any, batch: Tensor) -> None:
        assert optimizer is not module.made
        assert isinstance(optimizer, MultiObjectiveOptimizer)
        if not seen:
            optimizer.max_grad_norm = 0.1
            optimizer.weighting = "mgda"
            optimizer.refresh_every = 2
        two_lines(module, optimizer, batch)
        seen.append(optimizer.report)
        assert optimizer.report is module.made.report
        assert optimizer.objectives == module.made.objectives == ("left", "right")

    module = Module(step)
    fit(module)
    assert module.made.max_grad_norm == 0.1
    assert [report.age for report in seen[:4]] == [0, 1, 0, 1]
    assert repr(module.made.weighting) == "mgda"
    assert len({id(report) for report in seen}) == 10


def test_learning_rate_schedulers() -> None:
    class Scheduled(Module):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [ExponentialLR(optimizer, 0.5), ExponentialLR(optimizer, 0.8)]

    def step(module: Module, optimizer: Any, batch: Tensor) -> None:
        two_lines(module, optimizer, batch)
        for scheduler in module.lr_schedulers():
            scheduler.step()

    module = Scheduled(step)
    fit(module, epochs=1)
    assert module.made.param_groups[0]["lr"] == pytest.approx(0.01 * 0.4**5)


def test_two_optimizers_that_take_turns() -> None:
    """As of a GAN: while one steps, `toggle_optimizer` freezes what is the other's."""

    class Pair(Module):
        def __init__(self) -> None:
            super().__init__(two_lines)
            self.other = copy.deepcopy(self.net)

        def training_step(self, batch: Tensor, index: int) -> None:
            for net, optimizer in zip((self.net, self.other), self.optimizers(), strict=True):
                self.toggle_optimizer(optimizer)
                optimizer.zero_grad()
                optimizer.backward(losses_of(net, batch))
                optimizer.step()
                self.untoggle_optimizer(optimizer)

        def configure_optimizers(self) -> Any:
            return [make_optimizer(self.net), make_optimizer(self.other, max_grad_norm=0.1)]

    module = Pair()
    fit(module)
    assert_equal_nets(module.net, plain_loop(plain_step))
    assert_equal_nets(module.other, plain_loop(plain_step, max_grad_norm=0.1))


def test_gradient_accumulation() -> None:
    def halves(net: Callable[[Tensor], Tensor], optimizer: Any, batch: Tensor) -> None:
        for half in batch.chunk(2):
            optimizer.backward({name: loss / 2 for name, loss in losses_of(net, half).items()})
        optimizer.step()
        optimizer.zero_grad()

    module = Module(lambda module, optimizer, batch: halves(module.net, optimizer, batch))
    fit(module)
    assert_equal_nets(module.net, plain_loop(halves))


def test_clipping_by_lightning_takes_combine_first() -> None:
    def step(module: Module, optimizer: Any, batch: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses_of(module.net, batch))
        optimizer.combine()
        module.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        optimizer.step()

    module = Module(step)
    fit(module)
    for p, q in zip(module.net.parameters(), plain_loop(plain_step, max_grad_norm=0.1).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_lightnings_hook_before_a_step_sees_the_direction() -> None:
    class Watching(Module):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            assert all(p.grad is not None for p in self.net.parameters())
            norms = torch.stack([p.grad.norm() for p in self.net.parameters()])  # type: ignore[union-attr]
            torch.testing.assert_close(norms.norm().double(), optimizer.report.direction_norm, rtol=1e-5, atol=0)

    fit(Watching(two_lines), epochs=1)


@pytest.mark.parametrize("several", [False, True], ids=["one base", "several"])
def test_checkpoints_of_the_trainer_resume_where_they_were(tmp_path: Path, several: bool) -> None:
    options = {"weighting": "group-dro(0.5)", "several": several}
    whole = Module(two_lines, **options)
    fit(whole, epochs=3)
    trainer = fit(Module(two_lines, **options), epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    resumed = Module(two_lines, **options)
    fit(resumed, epochs=3, ckpt_path=tmp_path / "two.ckpt")
    assert_equal_nets(resumed.net, whole.net)
    assert resumed.made.own_state() == whole.made.own_state()


def test_bf16_autocast() -> None:
    module = Module(by_manual_backward)
    before = copy.deepcopy(module.net)
    fit(module, precision="bf16-mixed")
    reference = plain_loop(plain_step)
    for p, q, b in zip(module.net.parameters(), reference.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.02)
        assert not torch.equal(p, b)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step")
def test_fp16_with_a_scaler_takes_combine_first() -> None:
    def step(module: Module, optimizer: Any, batch: Tensor) -> None:
        optimizer.zero_grad()
        optimizer.backward(losses_of(module.net, batch), backward=module.manual_backward)
        optimizer.combine()
        optimizer.step()

    def fp16() -> MixedPrecision:
        return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**8))

    module = Module(step, nonfinite="propagate")
    fit(module, plugins=[fp16()])
    for p, q in zip(module.net.parameters(), plain_loop(plain_step).parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0.005)
    with pytest.raises(AssertionError, match="No inf checks were recorded"):  # torch's, and not silence
        fit(Module(by_manual_backward), plugins=[fp16()])


def test_one_plain_loss_in_manual_optimization_is_meant() -> None:
    """Warnings are errors here."""

    def step(module: Module, optimizer: Any, batch: Tensor) -> None:
        optimizer.zero_grad()
        module.manual_backward(losses_of(module.net, batch)["left"])
        optimizer.step()

    fit(Module(step))


class Automatic(Module):
    """As for a single loss: Lightning's closure calls its backward."""

    def __init__(self) -> None:
        super().__init__(two_lines)
        self.automatic_optimization = True

    def training_step(self, batch: Tensor, index: int) -> Tensor:  # type: ignore[override]
        return torch.stack(list(losses_of(self.net, batch).values())).sum()


@pytest.mark.parametrize("accumulated", [1, 2])
def test_automatic_optimization_is_not_silent(accumulated: int) -> None:
    """It knows one loss, so there is nothing to balance."""
    with pytest.warns(RuntimeWarning, match=r"balances nothing.*self.automatic_optimization = False") as told:
        fit(Automatic(), accumulate_grad_batches=accumulated)
    assert sum("balances nothing" in str(warning.message) for warning in told) == 1
