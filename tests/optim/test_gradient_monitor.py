"""GradientMonitor against networks whose gradients are known to vanish, explode, or be neither."""

from __future__ import annotations

import gc
import math
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from braze.optim import Adam, GradientMonitor
from braze.optim._stats import GradStats
from torch import Tensor, nn

pytestmark = pytest.mark.cpu_only(
    "the monitor reads numbers; the devices' are the optimizers' tests"
)


class Watched(torch.optim.Optimizer):
    """Gradient descent that measures as braze's optimizers do. Its step is its own: one that calls another
    class's runs the hooks twice."""

    collect_grad_stats = False
    updated = True
    calls = 0

    def __init__(self, parameters: Any, lr: float = 1e-3) -> None:
        super().__init__(parameters, {"lr": lr})
        self.stats: dict[Tensor, GradStats] = {}

    def grad_stats(self) -> dict[Tensor, GradStats]:
        return self.stats

    def step(self, closure: Any = None) -> Any:
        parameters = [p for g in self.param_groups for p in g["params"] if p.grad is not None]
        before = [p.detach().clone() for p in parameters]
        self.calls += self.collect_grad_stats
        for p, old in zip(parameters, before, strict=True):
            g = p.grad
            if self.updated:
                p.data.sub_(g, alpha=self.defaults["lr"])
            if not (self.collect_grad_stats and self.updated):
                continue
            self.stats[p] = GradStats(
                float(g.norm()),
                float(g.abs().max()),
                float((g == 0).double().mean()),
                int((~g.isfinite()).sum()),
                float((p.detach() - old).norm() / old.norm()) if old.any() else math.nan,
            )


class Sine(nn.Linear):
    """Bounded, so that only the gradients explode."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).sin()


def plain(scale: float = 1.0, depth: int = 12, kind: type[nn.Linear] = nn.Linear) -> nn.Sequential:
    """Linear layers each of which multiplies gradients by ``scale``."""
    layers = [kind(8, 8) for _ in range(depth)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, scale)
        nn.init.ones_(layer.bias)
    return nn.Sequential(*layers, nn.Linear(8, 3))


def train(model: nn.Module, optimizer: Any, steps: int = 3) -> None:
    torch.manual_seed(0)
    for _ in range(steps):
        optimizer.zero_grad()
        logits = model(torch.randn(16, 8))
        nn.functional.cross_entropy(logits, torch.randint(0, 3, (16,))).backward()
        optimizer.step()


def watched(model: nn.Module, lr: float = 1e-4, **settings: Any) -> tuple[Any, GradientMonitor]:
    optimizer = Watched(model.parameters(), lr=lr)
    return optimizer, GradientMonitor(model, optimizer, **settings)


def kinds(monitor: GradientMonitor) -> dict[str, str]:
    return {problem.parameter: problem.kind for problem in monitor.problems()}


def test_healthy() -> None:
    model = plain()
    optimizer, monitor = watched(model)
    assert monitor.problems() == [] and "no gradients" in monitor.report()
    train(model, optimizer)
    assert monitor.problems() == [] and "healthy (norms " in monitor.report()


def test_vanishing_names_the_layers_far_from_the_loss() -> None:
    model = plain(0.2)
    optimizer, monitor = watched(model, updates=(0.0, 1.0))
    train(model, optimizer)
    found = kinds(monitor)
    assert found["0.weight"] == "vanishing" and set(found.values()) == {"vanishing"}
    assert "11.weight" not in found and "12.weight" not in found and "0.bias" not in found
    values = [problem.value for problem in monitor.problems()]
    assert values == sorted(values) and values[0] < 1e-6 and values[-1] <= 1e-3
    assert monitor.report().startswith("gradients vanish in 0.weight, 1.weight")
    assert f"and {len(found) - 4} more" in monitor.report()


def test_exploding_does_not_blame_the_output() -> None:
    model = plain(6.0, kind=Sine)
    optimizer, monitor = watched(model, lr=1e-12, updates=(0.0, math.inf))
    train(model, optimizer)
    found = kinds(monitor)
    assert found["0.weight"] == "exploding" and set(found.values()) == {"exploding"}
    assert "12.weight" not in found
    assert monitor.report().startswith("gradients explode in 0.weight")


def test_all_weights_vanish_alike_without_biases() -> None:
    """Only the output's bias tells: w · ∂L/∂w is the same in all layers of a network without biases."""
    model = nn.Sequential(*[nn.Linear(8, 8, bias=False) for _ in range(12)], nn.Linear(8, 3))
    for layer in list(model)[:-1]:
        nn.init.orthogonal_(layer.weight, 0.3)
    optimizer, monitor = watched(model, updates=(0.0, 1.0))
    train(model, optimizer)
    assert {*kinds(monitor)} == {f"{i}.weight" for i in range(13)}


def test_dead_layer_has_zero_gradients() -> None:
    model = plain(depth=3)
    optimizer, monitor = watched(model, vanishing=0.0, updates=(0.0, 1.0))
    model.register_forward_pre_hook(lambda _, inputs: (0 * inputs[0],))
    train(model, optimizer)
    assert kinds(monitor) == {"0.weight": "vanishing"}


@pytest.mark.parametrize(("lr", "kind"), [(1e-12, "small updates"), (10.0, "large updates")])
def test_updates(lr: float, kind: str) -> None:
    model = plain(depth=1)
    optimizer, monitor = watched(model, lr=lr)
    train(model, optimizer, 1)
    assert set(kinds(monitor).values()) == {kind} and "updates are too" in monitor.report()


def test_non_finite_is_told_of_biases_too_and_leaves_the_medians_alone() -> None:
    model = plain(depth=2)
    optimizer, monitor = watched(model)
    train(model, optimizer, 3)
    model[0].bias.grad[0] = math.nan
    optimizer.step()
    assert monitor.problems() == [("0.bias", "non-finite", 0.25)]
    assert monitor.report() == "gradients are not finite in 0.bias (in up to 25% of the samples)"


def test_reference() -> None:
    model = plain(0.2)
    optimizer, monitor = watched(model, updates=(0.0, math.inf), reference="0")
    train(model, optimizer)
    assert kinds(monitor)["12.weight"] == "exploding"


def test_window_forgets() -> None:
    model = plain(depth=2)
    optimizer, monitor = watched(model, window=2)
    train(model, optimizer, 1)
    whole = {name: value.clone() for name, value in model.state_dict().items()}
    model[0].bias.grad[0] = math.inf
    optimizer.step()
    model.load_state_dict(whole)
    train(model, optimizer, 1)
    assert kinds(monitor) == {"0.bias": "non-finite"}
    train(model, optimizer, 1)
    assert kinds(monitor) == {}


def test_every_collects_only_what_is_sampled() -> None:
    model = plain(depth=2)
    optimizer, monitor = watched(model, every=3)
    train(model, optimizer, 8)
    writer = Writer()
    monitor.write(writer)
    assert optimizer.calls == 3 and {step for _, _, step in writer.rows} == {7}


def test_steps_that_only_accumulate_give_no_sample() -> None:
    model = plain(depth=2)
    optimizer, monitor = watched(model, every=2)
    train(model, optimizer, 1)
    optimizer.updated = False
    train(model, optimizer, 4)
    optimizer.updated = True
    train(model, optimizer, 1)
    assert [step for step, _ in monitor._samples] == [1, 6]


def test_close_restores_and_lets_go() -> None:
    model = plain(depth=2)
    optimizer, monitor = watched(model)
    with monitor:
        train(model, optimizer)
    assert not optimizer.collect_grad_stats and not optimizer._optimizer_step_post_hooks
    optimizer.collect_grad_stats = True
    monitor.close()
    assert optimizer.collect_grad_stats and "healthy" in monitor.report()
    optimizer, monitor = watched(model)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    monitor.close()


def test_on_an_optimizer_of_braze() -> None:
    model = plain(depth=2)
    optimizer = Adam(model.parameters(), lr=1e-3, accumulation_steps=2)
    with GradientMonitor(model, optimizer) as monitor:
        for steps in (1, 1, 1, 2):
            train(model, optimizer, steps)
    assert [step for step, _ in monitor._samples] == [2, 4]
    assert monitor._samples[0][1].keys() == dict(model.named_parameters()).keys()
    assert "healthy" in monitor.report() and not optimizer.collect_grad_stats


class Writer:
    def __init__(self) -> None:
        self.rows: list[tuple[str, float, int]] = []

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.rows.append((tag, value, step))


def test_write() -> None:
    model = plain(depth=1)
    optimizer, monitor = watched(model)
    writer = Writer()
    monitor.write(writer)
    assert not writer.rows
    train(model, optimizer, 2)
    monitor.write(writer, step=70)
    norm = float(model[1].weight.grad.norm())
    assert ("grad_norm/1.weight", pytest.approx(norm), 70) in writer.rows
    assert {tag.split("/")[0] for tag, *_ in writer.rows} == {"grad_norm", "update_ratio"}
    assert len(writer.rows) == 8
    with pytest.raises(TypeError, match="writer must have add_scalar"):
        monitor.write(None)
    with pytest.raises(ValueError, match="step must be"):
        monitor.write(writer, -1)


def test_heat_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    model = plain(depth=2)
    optimizer, monitor = watched(model)
    with pytest.raises(RuntimeError, match="no gradients"):
        monitor.heat_map(tmp_path / "map")
    train(model, optimizer, 3)
    sizes = []
    for name, value in (("finite", 0.0), ("nan", math.nan)):
        model[0].weight.grad.fill_(value)
        optimizer.step()
        monitor.heat_map(tmp_path / name)
        content = (tmp_path / name).read_bytes()
        assert content.startswith(b"\x89PNG")
        pixels = pytest.importorskip("matplotlib.image").imread(tmp_path / name)
        red = (pixels[..., 0] == 1) & (pixels[..., 1] == 0) & (pixels[..., 2] == 0)
        sizes.append(int(red.sum()))
    assert sizes[0] == 0 < sizes[1]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        monitor.heat_map(tmp_path / "map")


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"window": 0}, ValueError),
        ({"window": 2.5}, TypeError),
        ({"every": 0}, ValueError),
        ({"every": None}, TypeError),
        ({"vanishing": 1.0}, ValueError),
        ({"vanishing": "small"}, TypeError),
        ({"exploding": math.nan}, ValueError),
        ({"exploding": 1}, ValueError),
        ({"updates": (1e-3, 1e-3)}, ValueError),
        ({"updates": 1e-3}, TypeError),
        ({"reference": "9"}, ValueError),
    ],
)
def test_bad_arguments(settings: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error, match=f"^{next(iter(settings))} must be .*got "):
        watched(plain(depth=2), **settings)


def test_model_and_optimizer_belong_together() -> None:
    model, optimizer = plain(depth=1), Watched(plain(depth=1).parameters())
    with pytest.raises(ValueError, match="optimizer must have parameters of the model"):
        GradientMonitor(model, optimizer)
    with pytest.raises(TypeError, match=r"optimizer must be one of braze.optim's, got .*SGD"):
        GradientMonitor(model, torch.optim.SGD(model.parameters()))
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got list"):
        GradientMonitor(list(model.parameters()), optimizer)  # type: ignore[arg-type]
