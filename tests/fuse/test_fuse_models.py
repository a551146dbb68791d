"""braze.fuse on torchvision's and timm's networks: nothing changes, and nearly every batch norm is fused."""

from __future__ import annotations

import braze
import pytest
import torch
from braze.bench import models
from torch import nn

pytestmark = pytest.mark.cpu_only("is about modules, which are the same on every device")

# network: the least share of its batch norms that are fused with what follows; None: it has none
NETWORKS: dict[str, float | None] = {
    "resnet18": 1.0,
    "resnet50": 1.0,
    "densenet121": 1.0,
    "mobilenet_v2": 0.85,
    "mobilenet_v3_small": 0.85,
    "efficientnet_b0": 0.65,
    "regnet_y_400mf": 1.0,
    "vgg11_bn": 1.0,
    "googlenet": 1.0,
    "inception_v3": 1.0,
    "shufflenet_v2_x1_0": 0.65,
    "mnasnet1_0": 0.85,
    "deeplabv3_resnet50": 1.0,
    "r3d_18": 1.0,
    "convnext_tiny": None,
    "alexnet": None,
    "timm:resnetv2_50": 1.0,
    "timm:resnet26d": 1.0,
    "timm:efficientnet_b0": 0.8,
    "timm:mobilenetv3_small_100": 0.8,
    "timm:repvgg_a0": 1.0,
    "timm:cspresnet50": 0.9,
    "timm:hrnet_w18_small": 0.7,
    "timm:dla34": 0.7,
    "timm:convnext_atto": None,
}


def _load(name: str) -> nn.Module:
    for package in ("torchvision", *(("timm",) if name.startswith("timm:") else ())):
        if not models.is_installed(package):
            pytest.skip(f"{package} is not installed")
    torch.manual_seed(0)
    return models.load(name)


@pytest.mark.parametrize("name", NETWORKS)
def test_network(name: str) -> None:
    model = _load(name)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    parameters = list(model.parameters())
    classes = [type(module) for module in model.modules()]
    x = models.example(name, 2, 64)
    braze.fuse(model, example=x)  # compares outputs, gradients and buffers, in fp64 and in fp32
    report = braze.fusion_report(model)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert len(norms) == sum(map(len, (report.joined, report.folded, report.alone, report.left)))
    share = NETWORKS[name]
    assert share is None if not norms else len(report.joined) >= (share or 0) * len(norms)
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    model.load_state_dict(model.state_dict())
    braze.unfuse(model)
    assert [type(module) for module in model.modules()] == classes


def test_frozen_batch_norm_of_torchvision() -> None:
    _load("resnet18")
    from torchvision.ops.misc import FrozenBatchNorm2d

    model = models._import_torchvision().resnet18(weights=None, norm_layer=FrozenBatchNorm2d)
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    braze.fuse(model, example=torch.randn(2, 3, 64, 64), channels_last=True)
    assert len(braze.fusion_report(model).joined) == 20
    assert type(braze.unfuse(model).bn1) is FrozenBatchNorm2d


def test_conv_norm_activation_of_torchvision() -> None:
    _load("resnet18")
    from torchvision.ops import Conv2dNormActivation

    model = nn.Sequential(
        Conv2dNormActivation(3, 8, activation_layer=nn.Hardswish),
        Conv2dNormActivation(8, 8, 1, norm_layer=None),
        Conv2dNormActivation(8, 4, 1, activation_layer=None),
    )
    braze.fuse(model, example=torch.randn(2, 3, 8, 8))
    report = braze.fusion_report(model)
    assert (report.joined, report.folded) == (["0.1"], ["2.1"])
    assert isinstance(model[0], Conv2dNormActivation)
