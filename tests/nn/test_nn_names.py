"""braze.nn and braze.nn.functional are torch's, name by name, but for what braze has itself."""

from __future__ import annotations

import importlib
import inspect
import pickle
import subprocess
import sys

import braze.nn as bnn
import braze.nn.functional as bF
import pytest
import torch
import torch.nn.functional as F
from torch import nn

REPLACED = {
    *("functional", "utils"),
    *(f"{kind}{d}d" for kind in ("BatchNorm", "LazyBatchNorm", "Dropout") for d in (1, 2, 3)),
    *("Dropout", "AlphaDropout", "FeatureAlphaDropout", "SyncBatchNorm"),
}
ADDED = {
    *(f"{kind}{d}d" for kind in ("BatchNormAct", "ConvBNAct", "ConvBNReLU") for d in (1, 2, 3)),
    *("SyncBatchNormAct", "convert_sync_batchnorm", "ActDropout", "DropoutAdd", "to_torch"),
}
FUNCTIONS_REPLACED = {
    *("batch_norm", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "feature_alpha_dropout"),
}
FUNCTIONS_ADDED = {
    *("batch_norm_act", "batch_norm_add_act", "act_dropout", "dropout_add", "dropout_mask"),
}


def public(module: object) -> set[str]:
    return {name for name in dir(module) if not name.startswith("_")}


def test_every_other_name_is_torchs_object() -> None:
    for name in public(nn) - REPLACED:
        assert getattr(bnn, name) is getattr(nn, name), name
    for name in public(F) - FUNCTIONS_REPLACED:
        assert getattr(bF, name) is getattr(F, name), name


def test_replaced_names_are_ours() -> None:
    for name in REPLACED:
        assert getattr(bnn, name) is not getattr(nn, name)
    for name in FUNCTIONS_REPLACED:
        assert getattr(bF, name) is not getattr(F, name)
    assert bnn.functional is bF
    assert ADDED <= public(bnn) and FUNCTIONS_ADDED <= public(bF)


def test_nothing_else_is_added() -> None:
    modules = {name for name in public(bnn) if inspect.ismodule(getattr(bnn, name))}
    assert public(bnn) - public(nn) - modules == ADDED
    assert bnn.functional.__name__ == "braze.nn.functional"
    assert public(bF) - public(F) == FUNCTIONS_ADDED


def test_names_torch_keeps_to_itself() -> None:
    assert bF._verify_batch_size is F._verify_batch_size
    with pytest.raises(AttributeError, match="no_such_name"):
        bF.no_such_name  # noqa: B018


@pytest.mark.parametrize(
    "name",
    [
        "init",
        "modules",
        "modules.batchnorm",
        "parallel",
        "parameter",
        "utils.parametrizations",
        "utils.prune",
        "utils.rnn",
        "quantized.modules.conv",
    ],
)
def test_submodules_are_torchs(name: str) -> None:
    assert importlib.import_module(f"braze.nn.{name}") is importlib.import_module(
        f"torch.nn.{name}"
    )


def test_import_of_a_submodule_that_torch_has_not_loaded() -> None:
    code = (
        "import sys, braze.nn\n"
        "assert 'torch.nn.utils.prune' not in sys.modules\n"
        "import braze.nn.utils.prune as ours\n"
        "import torch.nn.utils.prune as theirs\n"
        "assert ours is theirs and theirs.__spec__.name == 'torch.nn.utils.prune'\n"
        "import importlib.util\n"
        "assert importlib.util.find_spec('braze.nn.utils.no_such_module') is None\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_classes_stand_in_for_torchs(dims: int) -> None:
    ours, theirs = (getattr(m, f"BatchNorm{dims}d") for m in (bnn, nn))
    assert issubclass(ours, theirs)
    assert ours.__name__ == ours.__qualname__ == theirs.__name__
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert issubclass(getattr(bnn, f"BatchNormAct{dims}d"), theirs)
    assert repr(ours(3)) == repr(theirs(3))
    assert ours._version == theirs._version
    for name in (f"ConvBNAct{dims}d", f"ConvBNReLU{dims}d"):
        module = getattr(bnn, name)(2, 3, 1)
        assert type(module.conv) is getattr(nn, f"Conv{dims}d")
        assert type(module.bn) is getattr(bnn, f"BatchNormAct{dims}d")
    assert issubclass(bnn.SyncBatchNormAct, nn.modules.batchnorm._BatchNorm)
    mine, torchs = (inspect.signature(f).parameters for f in (bF.batch_norm, F.batch_norm))
    assert [(p.name, p.default, p.kind) for p in mine.values()] == [
        (p.name, p.default, p.kind) for p in torchs.values()
    ]


def test_classes_are_found_again_by_pickle() -> None:
    for name in REPLACED - {"functional", "utils"} | ADDED:
        found = getattr(bnn, name)
        assert pickle.loads(pickle.dumps(found)) is found


@pytest.mark.parametrize("name", sorted(n for n in ADDED if "B" in n))
def test_construction_on_the_meta_device(name: str) -> None:
    arguments = (3, 4, 1) if name.startswith("Conv") else (4,)
    module = getattr(bnn, name)(*arguments, device="meta", dtype=torch.bfloat16)
    assert {p.device.type for p in module.parameters()} == {"meta"}
    assert {p.dtype for p in module.parameters()} == {torch.bfloat16}
    if "Sync" not in name:
        dims = int(name[-2])
        x = torch.ones(2, arguments[0], *(3,) * dims, device="meta", dtype=torch.bfloat16)
        y = module(x)
        assert y.device.type == "meta" and y.shape == (2, 4, *(3,) * dims)
