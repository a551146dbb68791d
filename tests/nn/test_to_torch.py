"""braze.nn.to_torch, and what whole models need to be stored and loaded."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import braze
import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.quantization import quantize_fx
from torch.fx.experimental import optimization

pytestmark = pytest.mark.cpu_only("is about modules, which are the same on every device")

DROPOUTS = ("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout")
NORMS = ("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm")
LAZY = tuple(f"Lazy{name}" for name in NORMS[:3])
IMAGE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_warnings() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="to_torch")
        yield


def network(library: Any) -> nn.Sequential:
    """``library``: braze.nn or torch.nn."""
    torch.manual_seed(0)
    images = torch.randn(3, 4, 3, 8, 8)  # before the dropouts, which draw differently
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), library.BatchNorm2d(4), nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), library.BatchNorm2d(4), library.Dropout2d(0.5)),
        nn.Flatten(), nn.Linear(144, 5), library.Dropout(0.5),
    )  # fmt: skip
    for batch in images:
        model(batch)
    return model


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# ----------------------------------------------------------------------------- classes


@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("name", [*DROPOUTS, *NORMS, *LAZY])
def test_the_module_stays_and_its_class_is_torchs(name: str, installed: bool) -> None:
    arguments = {"num_features": 4, "momentum": None} if name in NORMS else {}
    theirs = getattr(nn, name)
    module = getattr(braze.nn, name)(**arguments).eval()
    module.register_forward_hook(print)
    model = nn.ModuleList([nn.ModuleList([module]), module])
    before = {key: value for key, value in module.__dict__.items() if key != "cls_to_become"}
    with braze.install() if installed else warnings.catch_warnings():
        assert braze.nn.to_torch(model) is model
    assert model[1] is module is model[0][0] and type(module) is theirs
    for key, value in before.items():
        assert module.__dict__[key] is value
    assert not hasattr(module, "activation")
    again = nn.ModuleList([nn.ModuleList([theirs(**arguments)])])
    assert model[0].state_dict().keys() == again[0].state_dict().keys()
    assert repr(module) == repr(theirs(**arguments))
    braze.nn.to_torch(model)  # nothing is left to do
    assert type(braze.nn.to_torch(getattr(braze.nn, name)(**arguments))) is theirs


def test_a_fused_model_is_unfused() -> None:
    ours, theirs = network(braze.nn), network(nn)
    braze.fuse(ours)
    with torch.no_grad():
        ours.eval()(IMAGE)  # folds
    braze.nn.to_torch(ours)
    assert kinds(ours) == kinds(theirs)
    assert not any("braze" in key for module in ours.modules() for key in module.__dict__)
    torch.testing.assert_close(ours(IMAGE), theirs.eval()(IMAGE))


def test_synchronized_norms() -> None:
    model = braze.nn.convert_sync_batchnorm(network(braze.nn))
    assert type(model[1]) is braze.nn.SyncBatchNormAct
    braze.nn.to_torch(model)
    assert type(model[1]) is nn.SyncBatchNorm
    torch.testing.assert_close(model.eval()(IMAGE), network(nn).eval()(IMAGE))


class Mine(braze.nn.Dropout):
    pass


def test_one_warning_names_what_torch_has_not() -> None:
    parametrized = braze.nn.BatchNorm1d(3)
    nn.utils.parametrize.register_parametrization(parametrized, "weight", nn.Identity())
    left = {
        "act": braze.nn.BatchNormAct2d(3), "identity": braze.nn.BatchNormAct2d(3, activation=None),
        "conv": braze.nn.ConvBNAct2d(3, 3, 1), "drop": braze.nn.ActDropout(), "add": braze.nn.DropoutAdd(),
        "sync": braze.nn.convert_sync_batchnorm(braze.nn.BatchNormAct2d(3)), "mine": Mine(),
        "parametrized": parametrized,
    }  # fmt: skip
    model = nn.ModuleDict({**left, "norm": braze.nn.BatchNorm2d(3), "linear": nn.Linear(1, 1)})
    before = {name: type(module) for name, module in model.items()}
    with pytest.warns(UserWarning) as caught:
        warnings.filterwarnings("always")
        braze.nn.to_torch(model)
    (text,) = {str(warning.message) for warning in caught}
    assert len(caught) == 1 and "load this one's state_dict" in text
    for name, module in model.items():
        assert (f"{name} (" in text) == (name in left)
        assert (type(module) is before[name]) == (name not in ("norm",))


def test_no_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got int"):
        braze.nn.to_torch(3)  # type: ignore[type-var]


# --------------------------------------------------------------- what knows torch only


def fused_for_evaluation(model: nn.Module) -> nn.Module:
    return quantization.fuse_modules(model.eval(), [["0", "1", "2"], ["3.0", "3.1"]])


def quantized(model: nn.Module) -> nn.Module:
    prepared = quantize_fx.prepare_fx(
        model.eval(), quantization.get_default_qconfig_mapping("fbgemm"), (IMAGE,)
    )
    prepared(IMAGE)
    return quantize_fx.convert_fx(prepared)


def trained_for_quantization(model: nn.Module) -> nn.Module:
    model.train()[6].p = model[3][2].p = 0.0
    model.qconfig = quantization.get_default_qat_qconfig("fbgemm")
    fused = quantization.fuse_modules_qat(model, [["0", "1", "2"], ["3.0", "3.1"]])
    prepared = quantization.prepare_qat(fused)
    for _ in range(2):
        prepared(IMAGE)
    return prepared.eval()


PASSES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "fuse_modules": fused_for_evaluation,
    "fuse_modules_qat": trained_for_quantization,
    "fx_fuse": lambda model: optimization.fuse(model.eval()),
    "prepare_fx": quantized,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", PASSES)
def test_passes_over_torchs_classes(name: str) -> None:
    transform = PASSES[name]
    theirs = network(nn)
    with braze.install():
        ours = network(nn)
    ours.load_state_dict(theirs.state_dict())
    if name.startswith("fuse"):
        braze.fuse(ours)
    found, expected = transform(braze.nn.to_torch(ours)), transform(theirs)
    assert kinds(found)[1:] == kinds(expected)[1:]
    assert torch.equal(found(IMAGE), expected(IMAGE))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_passes_do_not_know_brazes() -> None:
    """Why to_torch is there."""
    with pytest.raises((NotImplementedError, AssertionError)):
        PASSES["fuse_modules"](network(braze.nn))


# ----------------------------------------------------------------------------- pickles


def test_a_pickle_needs_no_braze(tmp_path: Path) -> None:
    model = braze.fuse(network(braze.nn))
    braze.nn.to_torch(model.eval())
    torch.save((model, IMAGE, model(IMAGE)), tmp_path / "model.pt")
    code = (
        "import sys, torch; sys.modules['braze'] = None; "
        f"model, x, y = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False); "
        "assert torch.equal(model(x), y)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _torch_classes(model: nn.Module) -> list[type]:
    return [kind for kind in set(kinds(model)) if kind.__module__.startswith("torch.")]


def _load(model: nn.Module, allowed: list[Any]) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    with torch.serialization.safe_globals(allowed):
        loaded: nn.Module = torch.load(file, weights_only=True)
    return loaded


def test_weights_only_needs_the_users_classes_alone() -> None:
    model = nn.Sequential(
        network(braze.nn),
        nn.ModuleList(
            [getattr(braze.nn, name)() for name in (*DROPOUTS, "ActDropout", "DropoutAdd")]
        ),
        nn.ModuleList([getattr(braze.nn, name)(3) for name in NORMS]),
        nn.ModuleList([getattr(braze.nn, f"BatchNormAct{d}d")(3) for d in (1, 2, 3)]),
        nn.ModuleList([getattr(braze.nn, f"ConvBNReLU{d}d")(3, 3, 1) for d in (1, 2, 3)]),
        braze.nn.convert_sync_batchnorm(braze.nn.BatchNormAct2d(3)),
    ).eval()
    with torch.no_grad():
        model[4][1](IMAGE)  # folds
    assert "_braze_folded" in model[4][1].conv.__dict__
    loaded = _load(model, _torch_classes(model))
    assert kinds(loaded) == kinds(model)
    assert torch.equal(loaded[0](IMAGE), model[0](IMAGE))
    with pytest.raises(Exception, match="Weights only load failed"):
        _load(model, [])


def test_weights_only_allows_classes_of_modules_and_no_functions() -> None:
    ours = {
        value
        for value in torch.serialization.get_safe_globals()
        if getattr(value, "__module__", "").startswith("braze.")
    }
    assert len(ours) > 20 and all(isinstance(value, type) for value in ours)
    assert {kind.__name__ for kind in ours if not issubclass(kind, nn.Module)} == {"Folded"}


# ----------------------------------------------------------------------- torch.jit


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_cannot_be_fused() -> None:
    model = network(nn).eval()
    for scripted in (torch.jit.script(model), torch.jit.trace(model, IMAGE)):
        for function in (braze.fuse, braze.fusion_report):
            with pytest.raises(TypeError, match="the model that was scripted"):
                function(scripted)  # type: ignore[operator]
        assert braze.unfuse(scripted) is scripted and braze.nn.to_torch(scripted) is scripted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_script_among_others_is_left_alone() -> None:
    model = nn.Sequential(
        network(nn), torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.ReLU()))
    ).eval()
    expected = model(IMAGE)
    fused = braze.fuse(copy.deepcopy(model))
    assert "conv+bn+relu" in str(braze.fusion_report(fused))
    torch.testing.assert_close(fused(IMAGE), expected)
    assert torch.equal(braze.nn.to_torch(fused)(IMAGE), expected)
