"""What braze does otherwise than torch, for good: the table, and docs/differences.md that is made of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PAGE = Path(__file__).parents[2] / "docs" / "differences.md"
AREAS = ("Optimizers", "Batch norm", "Dropout", "Names", "Fusing")


@dataclass(frozen=True)
class Difference:
    """``cases``: patterns of ids of checks in torch_databases.py that show it; none if no check does."""

    area: str
    title: str
    what: str
    why: str
    cases: tuple[str, ...] = ()


DIFFERENCES: tuple[Difference, ...] = (
    Difference(
        "Optimizers",
        "Parameters that share memory are refused",
        "The same parameter twice in an optimizer, or two that overlap, is a ValueError at the first "
        "step. Torch warns of the one and says nothing of the other, and updates the shared elements twice.",
        "All parameters are updated in one parallel call, so two updates of an element would race.",
        ("*/same_parameter_twice/*", "*/overlapping_parameters/*"),
    ),
    Difference(
        "Optimizers",
        "`load_state_dict` copies",
        "The loaded tensors are copied. Torch takes those of the dict whose dtype and device fit, and then "
        "trains in the memory of the optimizer that they came from.",
        "Two optimizers must not write the same state.",
        ("*/loads_by_reference/*",),
    ),
    Difference(
        "Optimizers",
        "`_init_group` is not called",
        "A subclass that overrides this private method is not asked; `step`, `state_dict`, hooks and groups "
        "are.",
        "It builds in every step the lists that braze keeps.",
        ("*/overridden_init_group/*",),
    ),
    Difference(
        "Optimizers",
        "Gradients of another dtype than the parameter's",
        "With `grad_dtype=None` they are taken, and the state has the parameter's dtype. Torch's Adam and "
        "AdamW raise a RuntimeError, its SGD and RMSprop make the momentum in the gradient's dtype.",
        "The kernels convert while they read, and a state's dtype does not depend on what came first.",
        (
            "SGD/gradients_of_other_dtypes/*/most",
            "RMSprop/gradients_of_other_dtypes/*/most",
            "Adam*/gradients_of_other_dtypes/*",
        ),
    ),
    Difference(
        "Optimizers",
        "RMSprop's `centered` variance below zero",
        "Where rounding takes v - a² below zero, it counts as 0; torch's square root makes a NaN of it.",
        "A parameter that is NaN once stays it.",
    ),
    Difference(
        "Optimizers",
        "`torch.compile` calls the step as it is",
        "A graph break, never a recompilation; with `fullgraph=True` an error. `foreach=True` inside of a "
        "compiled function runs eagerly.",
        "The step is one native call already, faster than torch's compiled one.",
    ),
    Difference(
        "Optimizers",
        "Fractional step counts on a device",
        "A `step` of 2.5 that is kept on a CUDA device (`fused=True`, `capturable=True`) acts as 2 in the bias "
        "correction; on the CPU as 2.5.",
        "The kernels raise to an integer power, whose bits do not depend on a library.",
    ),
    Difference(
        "Optimizers",
        "Accumulation windows and what wraps an optimizer",
        "`ZeroRedundancyOptimizer`, replaced `param_groups`, schedulers, pickles and checkpoints keep an open "
        "window. torch's `_NamedOptimizer` loads only into an optimizer at the same point of one, and "
        "`flatten_optimizer_state_dict=True` does not carry it.",
        "These two take only keys that the groups have already.",
    ),
    Difference(
        "Optimizers",
        "Norms of gradients",
        "`max_grad_norm`, `braze.nn.utils.clip_grad_norm_` and `get_total_norm` sum squares in fp64 and "
        "round the norm once. Torch rounds the norm of each 16-bit gradient to 16 bits, and has infinity where "
        "squares overflow fp32. An fp64 gradient whose square overflows counts as not finite.",
        "Products of fp32 are exact in fp64, and the order of the sum depends on the shapes alone.",
    ),
    Difference(
        "Optimizers",
        "`braze.amp.GradScaler` leaves `.grad` scaled",
        "After `scaler.step(optimizer)` with an optimizer of braze, `.grad` is as `backward()` left it; "
        "torch's unscales it. After `unscale_()` it is unscaled in both.",
        "Writing gradients back that nobody reads takes a tenth of the step's memory traffic.",
    ),
    Difference(
        "Optimizers",
        "Averages of 16-bit weights are fp32",
        "`ema_decay` keeps an fp32 average of bf16 and fp16 parameters; torch's `AveragedModel` one in their "
        "dtype. A parameter without a gradient keeps its average.",
        "With a decay of 0.999 a 16-bit average rounds nearly every change away.",
    ),
    Difference(
        "Optimizers",
        "CUDA without braze's CUDA kernels",
        "Parameters on a CUDA device are a RuntimeError that says how to build the kernels; `foreach=True` "
        "or `fused=False` runs torch's code.",
        "A silent fallback would be the slowest of all.",
    ),
    Difference(
        "Batch norm",
        "Rounding",
        "Statistics are summed in two levels, in fp64 across blocks. For 16-bit inputs nothing between "
        "reading and the one rounding of the result is rounded. Values near the largest of their dtype give "
        "finite results where torch's overflow, or nan instead of infinity.",
        "More exact than torch, and the same bits for any number of threads.",
        ("batch_norm/extreme_values/*/largest-channel-train",),
    ),
    Difference(
        "Batch norm",
        "Running statistics whose elements overlap",
        "Training with an expanded `running_mean` or `running_var` is a RuntimeError; torch writes all of "
        "its channels into the one element.",
        "The channels are written in parallel.",
        ("batch_norm/errors/*/expanded_mean", "*/changed_attributes/*/expanded_mean"),
    ),
    Difference(
        "Batch norm",
        "Autograd is told of the running statistics",
        "Their version counters count each update, and backward of an earlier call in `eval()` uses the "
        "statistics of that call. In torch the counters stay, and such a backward uses the new statistics.",
        "A write that nobody counts gives wrong gradients without an error.",
        ("batch_norm/versions/*-train-*",),
    ),
    Difference(
        "Batch norm",
        "Tools that go by the exact class",
        "`torch.ao.quantization.fuse_modules` and `torch.fx.experimental.optimization.fuse` do not find "
        "braze's classes. `torch.nn.utils.fusion`, `convert_sync_batchnorm` and `update_bn` do.",
        "They look classes up in a table. `braze.nn.to_torch(model)` gives a model torch's classes back; "
        "`braze.fuse` folds, too.",
        ("*/fused_by_fx/*", "*/fused_by_quantization/*"),
    ),
    Difference(
        "Batch norm",
        "CUDA without braze's CUDA kernels",
        "A CUDA input is a RuntimeError that says how to build the kernels.",
        "As for optimizers.",
    ),
    Difference(
        "Dropout",
        "Another mask for the same seed",
        "Seeds give other masks than torch's. The mask is the same on every device, for any number of "
        "threads and in every memory format. A call in training takes one draw from the generator, whatever "
        "the size of the tensor, and also with `p=1`.",
        "It is made of Philox numbers in the kernels' order, and made again in backward instead of stored.",
        ("*/same_mask/*", "*/seeds/*-p1.0-*"),
    ),
    Difference(
        "Dropout",
        "What is dropped is +0",
        "Torch multiplies with 0, which keeps nan, makes inf nan and negative numbers -0. The gradient of "
        "what is dropped is +0, too.",
        "A dropped activation should not matter, whatever it was.",
        ("*/special_values/*", "*/negative_zero/*"),
    ),
    Difference(
        "Dropout",
        "p in steps of 1/65536",
        "`p` acts as the nearest multiple of 1/65536, at most 7.7e-6 away; the scale is that of the `p` that "
        "acts, so that the mean is exact.",
        "Sixteen random bits decide on an element, which halves the random numbers.",
        ("*/keep_rate/float64/p0.1",),
    ),
    Difference(
        "Dropout",
        "p that is nan",
        "A ValueError; torch raises a RuntimeError.",
        "As for any other p that is not between 0 and 1.",
        ("*/errors/*/p_nan",),
    ),
    Difference(
        "Dropout",
        "Torch's own dropout runs",
        "for tensor subclasses, nested tensors and other dtypes, and in what `torch.jit.trace`, "
        "`torch.jit.script` and `torch.export` make of a model and `torch.fx` of a function: these run "
        "without braze, with torch's mask. Under `vmap` the mask is drawn by torch, sample by sample.",
        "What leaves the process should not need braze to be run.",
        (
            "*/jit_trace_keeps_the_mask/*",
            "*/jit_script_keeps_the_mask/*",
            "*/export_keeps_the_mask/*",
            "*/fx_symbolic_trace_keeps_the_mask/*",
            "*/func_hessian_by_jacfwd/*",
            "*dropout*/composite*/*-train",  # a class of tensors
        ),
    ),
    Difference(
        "Names",
        "`braze.install()` is for what is looked up afterwards",
        "Names taken before (`from torch.nn import Dropout`), base classes and tables of packages imported "
        "before stay torch's, and so do torch's defining modules such as `torch.nn.modules.batchnorm`. "
        "`torch.ao.quantization` needs `braze.uninstall()` and `braze.nn.to_torch(model)` first.",
        "Python has bound the former, and pickle looks for torch's classes in the latter.",
    ),
    Difference(
        "Names",
        "`isinstance` goes both ways for modules",
        "`isinstance(torch.nn.BatchNorm2d(3), braze.nn.BatchNorm2d)` is True, for all modules of one name; "
        "not for optimizers.",
        "Programs that changed the import freeze and initialise layers of ready-made models by class.",
    ),
    Difference(
        "Names",
        "Pickles of whole models need braze where they are loaded",
        "With `weights_only=True` braze's classes are allowed by themselves and torch's by the user; a model "
        "of `braze.fuse` must be unfused first. Where braze is absent, load a `state_dict`, or pickle "
        "`braze.nn.to_torch(model)`.",
        "A pickle has the names of classes.",
    ),
    Difference(
        "Names",
        "`torch.jit.script` takes what torch has",
        "It compiles torch's code for BatchNorm and dropout modules, and does not take BatchNormAct, "
        "ConvBNAct, ActDropout, DropoutAdd and fused models.",
        "TorchScript is deprecated; `torch.compile` and `torch.export` take all of them.",
    ),
    Difference(
        "Names",
        "Function modes switch to torch's code",
        "Under a program's own `TorchFunctionMode` batch norm and dropout are torch's, for the mode to see.",
        "A mode is there to see torch's functions.",
    ),
    Difference(
        "Fusing",
        "What a fused block does not do",
        "The value between batch norm, sum and activation is not rounded to 16 bits, does not exist for "
        "hooks (a block with hooks runs unfused), and a convolution's bias before a batch norm in training "
        "has the gradient zero instead of rounding's noise.",
        "It is never written to memory.",
    ),
)


def page() -> Iterator[str]:
    yield "# Differences from PyTorch\n"
    yield (
        "braze is checked with torch's own databases of operators, modules and optimizers, with torch in "
        "the same run as the control (`tests/nn/test_torch_databases.py`). What torch passes and braze does "
        "not is an error there, unless it stands here. This page is made of the table in "
        "`tests/support/differences.py` by `python tests/support/differences.py`.\n"
    )
    for area in AREAS:
        yield f"## {area}\n"
        for d in DIFFERENCES:
            if d.area == area:
                between = " " if d.what[0].islower() else ". "
                yield f"- **{d.title}**{between}{d.what} *{d.why}*"
        yield ""


def main() -> int:
    """Writes the page; --check only compares."""
    text = "\n".join(page()).rstrip() + "\n"
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
