"""braze.install: torch's names are braze's while it lasts, and torch goes on as if nothing had happened."""

from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import braze
import pytest
import torch
import torch.nn.functional as F
from braze._install import REPLACED
from fuse_cases import block
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader, Dataset

pytestmark = pytest.mark.cpu_only("is about names, which are the same on every device")

CLASSES = {
    *("BatchNorm1d", "BatchNorm2d", "BatchNorm3d", "SyncBatchNorm"),
    *("Dropout", "Dropout1d", "Dropout2d", "Dropout3d", "AlphaDropout", "FeatureAlphaDropout"),
    *("LazyBatchNorm1d", "LazyBatchNorm2d", "LazyBatchNorm3d"),
}
FUNCTIONS = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout", "feature_alpha_dropout"),
    "batch_norm",
}
OPTIMIZERS = {"SGD", "Adam", "AdamW", "RMSprop"}
UTILITIES = {"clip_grad_norm_", "clip_grad_value_", "get_total_norm"}
ORIGINAL = {
    **{name: getattr(nn, name) for name in CLASSES},
    **{name: getattr(F, name) for name in FUNCTIONS},
    **{name: getattr(torch.optim, name) for name in OPTIMIZERS},
    **{name: getattr(nn.utils, name) for name in UTILITIES},
    "GradScaler": torch.amp.GradScaler,
}


@pytest.fixture(autouse=True)
def nothing_installed() -> Iterator[None]:
    assert not _installed()
    before = _names()
    yield
    after = _names()
    assert {place: after[place] for place in before} == before  # to the last attribute
    assert not set(after.values()) & set(map(id, REPLACED.values()))


def _installed() -> bool:
    return nn.Dropout is not ORIGINAL["Dropout"]


def _names() -> dict[tuple[str, str], int]:
    """What every attribute of torch.nn, torch.optim and torch.amp is."""
    return {
        (name, attribute): id(value)
        for name, module in list(sys.modules.items())
        if f"{name}.".startswith(("torch.nn.", "torch.optim.", "torch.amp."))
        for attribute, value in vars(module).items()
        if not attribute.startswith("_")  # some of which torch._dynamo replaces
    }


# ----------------------------------------------------------------------------- names


def test_every_name_that_both_have_is_replaced() -> None:
    assert set(REPLACED) == set(ORIGINAL.values())
    places = (
        *((nn, CLASSES), (nn.modules, CLASSES), (F, FUNCTIONS), (torch.optim, OPTIMIZERS)),
        *((nn.utils, UTILITIES), (torch.amp, {"GradScaler"})),
    )
    with braze.install():
        for module, names in places:
            for name in names:
                assert getattr(module, name) is REPLACED[ORIGINAL[name]], name
                assert getattr(module, name).__module__.startswith("braze."), name
        assert nn.modules.transformer.Dropout is braze.nn.Dropout
        assert nn.Linear.__module__ == "torch.nn.modules.linear"


def test_classes_stay_where_pickle_looks_for_them() -> None:
    with braze.install():
        for name in CLASSES | OPTIMIZERS | {"GradScaler"}:
            original = ORIGINAL[name]
            assert getattr(sys.modules[original.__module__], name) is original


def test_calls_may_be_nested_and_repeated() -> None:
    with braze.install():
        with braze.install():
            assert _installed()
        assert _installed()
        braze.install()
    assert _installed()  # the call outside of any `with`
    with braze.install() as again, again:
        braze.uninstall()
        assert not _installed()
        with again:
            assert _installed()
        assert not _installed()
    braze.uninstall()
    braze.uninstall()
    assert not _installed()


def test_an_error_uninstalls() -> None:
    with pytest.raises(KeyError), braze.install():
        raise KeyError
    assert not _installed()


def test_names_that_others_replaced_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(*args: Any) -> None: ...

    for name in ("dropout", "dropout1d"):
        monkeypatch.setattr(F, name, getattr(F, name))  # to be put back at the end
    F.dropout = mine  # type: ignore[assignment]
    with braze.install():
        assert F.dropout is mine
        F.dropout1d = mine  # type: ignore[assignment]
    assert F.dropout1d is mine
    monkeypatch.undo()


def test_threads() -> None:
    wrong: list[str] = []

    def work() -> None:
        for _ in range(30):
            with braze.install():
                if not _installed():
                    wrong.append("inside")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not _installed()


class _Names(Dataset[int]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        with braze.install():
            return int(nn.Dropout is braze.nn.Dropout) + 2 * int(_installed())


def test_forked_workers_have_the_same_names() -> None:
    with braze.install():
        loader = DataLoader(_Names(), num_workers=1, multiprocessing_context="fork")
        assert [int(value) for value in loader] == [3, 3]


# ------------------------------------------------------- what torch's own code calls


class Network(nn.Module):
    """With torch's and braze's names at every place where they can be looked up."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.drop, self.mine = ORIGINAL["Dropout"](0.5), nn.Dropout2d(0.5)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, 0.5, batch_first=True)
        self.linear = nn.Linear(8, 8)
        self.head = nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4, momentum=None))

    def forward(self, x: Tensor) -> Tensor:
        y = self.drop(self.mine(F.relu(self.norm(self.conv(x)))))
        y = self.layer(y.flatten(2).transpose(1, 2)).mean(1)
        y = F.dropout(F.relu(self.linear(y)), 0.1, self.training)
        y = self.head(ORIGINAL["dropout"](F.relu(self.linear(y)), 0.1, self.training))
        return F.batch_norm(y, None, None, training=True)


def _network(seed: int = 0) -> Network:
    torch.manual_seed(seed)
    return Network()


IMAGE = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def _node(y: Tensor) -> str:
    assert y.grad_fn is not None
    return y.grad_fn.name()


@pytest.mark.parametrize("name", sorted(CLASSES - {"SyncBatchNorm"}))  # that needs processes
def test_forwards_of_torchs_modules_call_braze(name: str) -> None:
    shape = (4, 3) if name.endswith("Norm1d") else (4, 3, 4, 4, 4) if "3d" in name else (4, 3, 4)
    x = torch.randn(*shape, *([4] if "2d" in name else [])).requires_grad_()
    module = ORIGINAL[name](**({"num_features": 3} if name.startswith("Batch") else {}))
    with braze.install():
        assert "braze::" in _node(module(x))
    assert "braze::" not in _node(module(x))


def test_masks_are_brazes_in_torchs_modules() -> None:
    x = torch.ones(8, 64)
    attention = nn.MultiheadAttention(8, 2, 0.5)
    q = torch.randn(5, 1, 8)

    def masks() -> list[Tensor]:
        torch.manual_seed(0)
        return [nn.Dropout(0.5)(x), F.dropout(x), attention(q, q, q)[1], ORIGINAL["Dropout"]()(x)]

    torchs = masks()
    with braze.install():
        brazes = masks()
    torch.manual_seed(0)
    expected = [braze.nn.functional.dropout(x) for _ in range(2)]
    assert torch.equal(brazes[0], expected[0]) and torch.equal(brazes[1], expected[1])
    for ours, theirs in zip(brazes, torchs, strict=True):
        assert not torch.equal(ours, theirs)


@pytest.mark.parametrize("name", sorted(FUNCTIONS))
def test_what_the_kernels_do_not_take_does_not_recurse(name: str) -> None:
    """braze's functions hand it to torch's: to torch's own, not to what has their name now."""
    numbers = torch.zeros(3, device="meta"), torch.ones(3, device="meta")
    x = torch.empty(2, 3, 4, 4, 4, device="meta")
    x = x[..., 0] if "2d" in name else x[..., 0, 0] if "1d" in name else x
    arguments: tuple[Any, ...] = numbers if name == "batch_norm" else ()
    with braze.install():
        for training in (True, False):
            for inplace in (True, False) if name != "batch_norm" else (False,):
                options = {"inplace": inplace} if inplace else {}
                y = getattr(F, name)(x, *arguments, training=training, **options)
                assert y.is_meta and y.shape == x.shape
        if name != "batch_norm":
            with pytest.raises(ValueError, match="between 0 and 1"):
                getattr(F, name)(x, p=2.0)


def test_compositions_do_not_recurse() -> None:
    """Of torch's operations, for tensors that the kernels do not take."""
    x = torch.empty(2, 3, 4, 4, device="meta")
    modules = [braze.nn.ActDropout("relu", 0.5), braze.nn.DropoutAdd(0.5)]
    modules += [
        braze.nn.BatchNormAct2d(3, device="meta"),
        braze.nn.ConvBNAct2d(3, 3, 1, device="meta"),
    ]
    with braze.install():
        for module in modules:
            for training in (True, False):
                module.train(training)
                assert module(*([x, x] if type(module) is braze.nn.DropoutAdd else [x])).is_meta


def test_modes_see_dropouts() -> None:
    seen = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(function)
            return function(*args, **(kwargs or {}))

    with Mode():
        braze.nn.functional.dropout(torch.ones(3))
    assert seen[-1] is ORIGINAL["dropout"]
    with braze.install(), Mode():
        F.dropout(torch.ones(3))
        assert seen[-1] is F.dropout


# ----------------------------------------------------------------------------- life


def _optimizer_state(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t)]


def _trained(make: Callable[..., torch.optim.Optimizer]) -> tuple[Network, torch.optim.Optimizer]:
    model = _network()
    optimizer = make(model.parameters(), lr=0.1)
    model(IMAGE).square().sum().backward()
    optimizer.step()
    return model, optimizer


def _saved(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("made", ["before", "during"])
@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value)), _saved]
)
def test_copies_and_pickles(made: str, when: str, optimizer: str, copied: Any) -> None:
    def make() -> tuple[Network, torch.optim.Optimizer]:
        return _trained(getattr(torch.optim, optimizer))

    def check() -> None:
        again = copied((model, stepped))
        for old, new in zip(model.modules(), again[0].modules(), strict=True):
            assert type(old) is type(new)
        assert type(again[1]) is type(stepped)
        for old, new in zip(_optimizer_state(stepped), _optimizer_state(again[1]), strict=True):
            assert torch.equal(old, new)
        for name, value in again[0].state_dict().items():
            assert torch.equal(value, model.state_dict()[name])

    if made == "before":
        model, stepped = make()
    with braze.install():
        if made == "during":
            model, stepped = make()
            assert type(stepped) is getattr(braze.optim, optimizer)
        if when == "during":
            check()
    if when == "after" or (when == "before" and made == "before"):
        check()


def test_isinstance_holds_for_modules_made_before() -> None:
    before = _network()
    with braze.install():
        for module in (before, _network()):
            assert sum(isinstance(m, nn.BatchNorm2d) for m in module.modules()) == 1
            assert sum(isinstance(m, nn.Dropout) for m in module.modules()) == 4
        assert isinstance(nn.BatchNorm2d(3), nn.modules.batchnorm.BatchNorm2d)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    made = (nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.AlphaDropout())
    before, attention = nn.Sequential(*made), nn.MultiheadAttention(8, 2, 0.5)
    q = torch.randn(5, 1, 8)

    def run() -> list[Tensor]:
        # What was compiled already would be taken as it is.
        store = torch.jit._recursive.ConcreteTypeStore()
        monkeypatch.setattr(torch.jit._recursive, "concrete_type_store", store)

        def function(x: Tensor) -> Tensor:
            return F.dropout(F.batch_norm(x, None, None, training=True), 0.5, True)

        torch.manual_seed(0)
        scripted = [torch.jit.script(m) for m in (before, attention, function)]
        return [scripted[0](IMAGE), scripted[1](q, q, q)[0], scripted[2](IMAGE)]

    with braze.install():
        found = run()
    for a, b in zip(found, run(), strict=True):
        assert torch.equal(a, b)


def test_compile() -> None:
    """Before, during and after: of a name that is another function now, dynamo compiles that one."""
    torch._dynamo.reset()
    model = _network().eval()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    expected = model(IMAGE)
    for installed in (False, True, False):
        with braze.install() if installed else torch.enable_grad():
            torch.testing.assert_close(compiled(IMAGE), expected, rtol=1e-4, atol=1e-5)
            other = _network().eval()
            assert isinstance(other.norm, braze.nn.batch_norm.FusedBatchNorm) is installed
            found = torch.compile(other, backend="aot_eager", fullgraph=True)(IMAGE)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
            dropped = torch.compile(F.dropout, backend="aot_eager", fullgraph=True)(torch.ones(999))
            assert set(dropped.tolist()) == {0.0, 2.0}
    torch._dynamo.reset()


@pytest.mark.parametrize("made", ["before", "during"])
def test_fuse(made: str) -> None:
    expected = str(braze.fusion_report(_network()))
    model = _network() if made == "before" else None
    by_name = block(lambda self, x: F.dropout(F.relu(x), 0.1, self.training))
    by_reference = block(lambda self, x: ORIGINAL["dropout"](F.relu(x), 0.1, self.training))
    by_module = nn.Sequential(nn.ReLU(), nn.Dropout(0.1))
    with braze.install():
        for small in (by_name, by_reference, by_module):
            assert "relu+dropout" in str(braze.fusion_report(small))
        model = model or _network()
        assert str(braze.fusion_report(model)) == expected
        braze.fuse(model, example=IMAGE)
        assert type(model.norm) is braze.nn.BatchNorm2d
        fused = model(IMAGE)
        braze.unfuse(model)
    assert fused.isfinite().all()
    assert type(model.norm) is (braze.nn if made == "during" else nn).BatchNorm2d


def test_an_example_has_no_dropout_in_functions_either() -> None:
    """Outside of install, too: the masks of F.dropout and of the fused pass differ."""
    braze.fuse(_network(), example=IMAGE)
