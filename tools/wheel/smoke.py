"""Run by the Python of a fresh environment that has torch and the wheel: does what was installed work?

python smoke.py cuda     or, where no CUDA kernels are to be expected:     python smoke.py cpu
"""

import re
import sys
from pathlib import Path
from typing import Any

import torch

kind = sys.argv[1]
assert "braze" not in sys.modules and kind in ("cpu", "cuda")

import braze  # noqa: E402
from braze import _native, nn, optim  # noqa: E402

package = Path(str(_native.__file__)).parent
assert Path(str(_native._C.__file__)).parent == package, f"not the wheel's: {_native._C.__file__}"
assert _native.minor(_native._C.TORCH_VERSION) == _native.minor(torch.__version__)


def trained(module: Any, name: str, **options: Any) -> list[torch.nn.Parameter]:
    """Parameters after three steps."""
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(n)) for n in (1, 63, 4097)]
    optimizer = getattr(module, name)(parameters, **options)
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn_like(p)
        optimizer.step()
    return parameters


# With powers of two every product is exact, and a fused multiply-add rounds as torch's two operations do.
halves: dict[str, Any] = {"lr": 0.25, "momentum": 0.5, "weight_decay": 0.125, "nesterov": True}
for p, q in zip(
    trained(optim, "SGD", **halves), trained(torch.optim, "SGD", **halves), strict=True
):
    assert torch.equal(p, q), "SGD: other bits than torch's"
for p, q in zip(trained(optim, "AdamW"), trained(torch.optim, "AdamW"), strict=True):
    torch.testing.assert_close(p, q)

torch.manual_seed(0)
x = torch.randn(4, 6, 5, 5, requires_grad=True)
y = x.detach().clone().requires_grad_()
norm = nn.BatchNormAct2d(6, activation="relu")
out, expected = norm(x), torch.relu(torch.nn.BatchNorm2d(6)(y))
grad = torch.randn_like(out)
out.backward(grad)
expected.backward(grad)
torch.testing.assert_close(out, expected)
torch.testing.assert_close(x.grad, y.grad)

if kind == "cuda":
    assert torch.version.cuda, "a torch without CUDA"
    assert _native.cuda_missing() == "", _native.cuda_missing()
    assert Path(str(_native.CUDA_FILE)).parent == package, f"not the wheel's: {_native.CUDA_FILE}"
    assert "cuda" in _native._C.backends(), _native._C.backends()
elif torch.version.cuda:
    assert "-m braze build" in _native.cuda_missing(), _native.cuda_missing()

maps = Path("/proc/self/maps").read_text().split()
for runtime in ("libgomp", "libcudart"):
    files = {part for part in maps if re.search(rf"/{runtime}[-.\w]*\.so", part)}
    assert len(files) <= 1, f"several of {runtime}: {files}"
for key, value in braze.build_info().items():
    print(f"{key:16} {value}")
