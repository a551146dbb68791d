"""The networks that the benchmarks of whole models run, from torchvision and timm, with random weights."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .rows import Hopeless

TORCHVISION = (
    "resnet18 resnet50 resnext50_32x4d wide_resnet50_2 vgg11_bn vgg16_bn googlenet inception_v3 densenet121 "
    "mobilenet_v2 mobilenet_v3_small mobilenet_v3_large mnasnet1_0 shufflenet_v2_x1_0 efficientnet_b0 "
    "efficientnet_v2_s regnet_x_400mf regnet_y_400mf fcn_resnet50 deeplabv3_resnet50 "
    "lraspp_mobilenet_v3_large r3d_18 r2plus1d_18"
).split()
_TIMM = (
    "resnet26d resnetv2_50 seresnet50 ecaresnet26t skresnet18 resnest14d res2net50_26w_4s resnetrs50 "
    "repvgg_a0 gernet_s regnety_004 densenet121 dla34 dpn68 hrnet_w18_small cspresnet50 cspdarknet53 "
    "darknet53 ese_vovnet19b_dw selecsls42b xception41 inception_v4 mobilenetv2_100 mobilenetv3_large_100 "
    "mobilenetv4_conv_small mobileone_s0 lcnet_050 ghostnet_100 mixnet_s fbnetc_100 rexnet_100 "
    "efficientnet_lite0 tf_efficientnetv2_b0 hgnet_tiny"
)
TIMM = [f"timm:{name}" for name in _TIMM.split()]
_VIDEO = ("r3d_18", "mc3_18", "r2plus1d_18")
_VIDEO_FRAMES = 4
_SEGMENTATION = ("fcn_", "deeplabv3_", "lraspp_")
# inception_v3's auxiliary head has a 5 x 5 convolution over what is left of 299 pixels.
_SMALLEST = {"inception_v3": 299, "timm:inception_v4": 96}
# A library lives as long as its object.
_stand_ins: list[torch.library.Library] = []


class ModelError(Hopeless):
    """A network is not to be had: its package is missing, or no network has that name."""


def is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _torchvision_command() -> str:
    """torchvision 0.(N + 15) belongs to torch 2.N; without --no-deps pip might replace torch."""
    minor = int(torch.__version__.split(".")[1])
    return f"pip install --no-deps 'torchvision==0.{minor + 15}.*' numpy pillow"


def _import_torchvision() -> ModuleType:
    spec = importlib.util.find_spec("torchvision")
    assert spec is not None
    _provide_operators(Path(next(iter(spec.submodule_search_locations or ["."]))))
    return importlib.import_module("torchvision.models")


def _provide_operators(folder: Path) -> None:
    """Declares the two operators that torchvision cannot be imported without.

    PyPI's torchvision is built for CUDA, and its library does not load into a torch for CPUs. No network here
    calls them.
    """
    for library in (*folder.glob("_C*.so"), *folder.glob("_C*.pyd")):
        try:
            torch.ops.load_library(str(library))
        except OSError:
            continue
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            stand_in = torch.library.Library("torchvision", "FRAGMENT")
            stand_in.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _stand_ins.append(stand_in)


def _unknown(name: str, names: list[str], prefix: str = "") -> ModelError:
    near = [prefix + other for other in difflib.get_close_matches(name, names)]
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    return ModelError(f"there is no model '{prefix}{name}'{hint}")


def require(name: str) -> None:
    """Raises ModelError, with the pip command, where the package of that network is missing."""
    if name.startswith("timm:") and not is_installed("timm"):
        raise ModelError(f"timm, which has '{name[5:]}', is not installed; pip install timm")
    if not is_installed("torchvision"):  # which timm imports too
        raise ModelError(f"torchvision is not installed; {_torchvision_command()}")


def _load_torchvision(name: str) -> nn.Module:
    models = _import_torchvision()
    if name not in models.list_models():
        raise _unknown(name, models.list_models())
    options: dict[str, Any] = {"weights": None}
    if name.startswith(_SEGMENTATION):
        options["weights_backbone"] = None
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    model: nn.Module = models.get_model(name, **options)
    return model


def _load_timm(name: str) -> nn.Module:
    _import_torchvision()  # which timm imports
    timm = importlib.import_module("timm")
    if not timm.is_model(name):
        raise _unknown(name, timm.list_models(), "timm:")
    model: nn.Module = timm.create_model(name, pretrained=False)
    return model


def load(name: str) -> nn.Module:
    """A network with random weights, in training mode.

    Args:
        name: torchvision's name of a model, or ``timm:`` and timm's name.

    Raises:
        ModelError: there is no such model, or its package is missing; the message has the pip command.
    """
    require(name)
    if name.startswith("timm:"):
        return _load_timm(name.removeprefix("timm:")).train()
    return _load_torchvision(name).train()


def example(name: str, batch: int, size: int) -> Tensor:
    """Random images of ``size`` x ``size`` pixels, or of what the network needs at least; clips for video."""
    side = max(size, _SMALLEST.get(name, 1))
    frames = (_VIDEO_FRAMES,) if name in _VIDEO else ()
    return torch.randn(batch, 3, *frames, side, side)


def heads(output: Any) -> list[Tensor]:
    """The tensors a network returns: one, or those of its auxiliary classifiers too."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]


def labels(batch: int) -> Tensor:
    """A class for every image; all networks have more than ten."""
    return torch.arange(batch) % 10
