"""What was fused where, and what was not and why."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import nn

from braze._fusion.block import BlockFusion, fusion_of
from braze._fusion.kinds import default_kinds
from braze._fusion.plan import is_library_leaf, original_class
from braze.nn._conv_chain import verdict
from braze.nn._norms import norm_activation

__all__ = ["OPTIONS", "BlockReport", "FusionReport", "report"]

OPTIONS = "_braze_fuse_options"  # attribute of a model that was fused


@dataclass
class BlockReport:
    """One module whose forward calls others.

    ``convolutions`` says who computes each that could be braze's in training, cuDNN or braze, and why. It is
    known of those that the model has been called with.
    """

    name: str
    kind: str
    fused: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    reason: str = ""
    convolutions: dict[str, str] = field(default_factory=dict)


@dataclass
class FusionReport:
    """Every block, and every batch norm by its fate; ``print`` it.

    Attributes:
        blocks: the blocks in which something is fused, or could not be.
        joined: batch norms computed together with an activation, a sum or both.
        folded: other batch norms that become part of their convolution in ``eval()`` without gradients.
        alone: batch norms that nothing follows which could be fused.
        left: batch norms that stay as they are although an activation or a sum follows, or whose block cannot
            be traced, and the reason.
    """

    blocks: list[BlockReport] = field(default_factory=list)
    joined: list[str] = field(default_factory=list)
    folded: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = []
        for block in self.blocks:
            lines.append(f"{block.name or '(the model)'}: {block.kind}")
            lines += [f"    fused  {text}" for text in block.fused]
            lines += [f"    conv   {name}: {who}" for name, who in block.convolutions.items()]
            lines += [f"    left   {name}: {reason}" for name, reason in block.left.items()]
            if block.reason:
                lines.append(f"    left as it is: {block.reason}")
        total = len(self.joined) + len(self.folded) + len(self.alone) + len(self.left)
        lines.append(
            f"{total} batch norms: {len(self.joined)} fused with what follows, {len(self.folded)} with "
            f"their convolution in eval() only, {len(self.alone)} alone, {len(self.left)} left as they are"
        )
        return "\n".join(lines)


def _join(*names: str) -> str:
    return ".".join(filter(None, names))


def own_norms(module: nn.Module, prefix: str = "") -> list[str]:
    """Names of the batch norms that its forward calls itself, also those in lists."""
    found = []
    for name, child in module.named_children():
        if norm_activation(child) is not None:
            found.append(_join(prefix, name))
        elif isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            found += own_norms(child, _join(prefix, name))
    return found


def report(model: nn.Module) -> FusionReport:
    """What is fused in ``model``, or, where it is not, what :func:`fuse` would do."""
    dropout = model.__dict__.get(OPTIONS, {}).get("dropout", True)
    result = FusionReport()
    joined: set[str] = set()
    folded: set[str] = set()
    left: dict[str, str] = {}
    for name, module in model.named_modules():
        if is_library_leaf(module) or norm_activation(module) is not None:
            continue
        fusion = fusion_of(module) or BlockFusion(dropout)
        block = BlockReport(name, original_class(module).__name__)
        kinds = default_kinds(module)
        for training in (True, False):
            fusion.prepare(module, kinds, training)
            for plan in fusion.plans(training):
                for fused in plan.fusions:
                    text = f"{fused.kind}: {', '.join(fused.modules)}"
                    if text not in block.fused:
                        block.fused.append(text)
                    target = joined if fused.follows else folded
                    target.update(_join(name, norm) for norm in fused.norms)
                    for child in fused.modules if training else ():
                        if (who := verdict(module.get_submodule(child))) is not None:
                            block.convolutions[child] = who
                if training:
                    for norm, reason in plan.left:
                        block.left[norm] = left[_join(name, norm)] = reason
        reasons = dict.fromkeys(fusion.reasons.values())
        norms = own_norms(module)
        if reasons and not block.fused and norms:
            block.reason = "; ".join(reasons)
            for norm in norms:
                left[_join(name, norm)] = block.reason
        if block.fused or block.left or block.reason:
            result.blocks.append(block)
    paths = {module: name for name, module in model.named_modules()}
    same = {name: paths[module] for name, module in model.named_modules(remove_duplicate=False)}
    joined, folded = {same[n] for n in joined}, {same[n] for n in folded}
    left = {same[n]: reason for n, reason in left.items()}
    for name, module in model.named_modules():
        is_norm = isinstance(module, nn.modules.batchnorm._NormBase) or (
            norm_activation(module) is not None
        )
        if not is_norm:
            continue
        if name in joined:
            result.joined.append(name)
        elif name in left:
            result.left[name] = left[name]
        elif name in folded:
            result.folded.append(name)
        else:
            result.alone.append(name)
    return result
