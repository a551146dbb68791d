"""``import braze.nn.utils.prune`` and the like give torch's very modules."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

_PREFIX = "braze.nn."


def _torch_name(name: str) -> str:
    return "torch" + name.removeprefix("braze")


class _TorchModule(MetaPathFinder, Loader):
    """Finds what is below torch's subpackages, which Python would otherwise load a second time."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not name.startswith(_PREFIX) or "." not in name.removeprefix(_PREFIX):
            return None
        try:
            found = importlib.util.find_spec(_torch_name(name))
        except ModuleNotFoundError:
            found = None
        return None if found is None else ModuleSpec(name, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(_torch_name(spec.name))
        spec.loader_state = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__  # the import system has put the new one in
        if spec is not None:
            module.__spec__ = spec.loader_state


def install() -> None:
    """Makes ``braze.nn.X`` torch's module for every X that braze has not itself."""
    for name, module in list(sys.modules.items()):
        if name.startswith("torch.nn."):
            sys.modules.setdefault("braze" + name.removeprefix("torch"), module)
    if not any(isinstance(finder, _TorchModule) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TorchModule())
