"""Running averages of the weights, which the step writes while it updates them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor
from torch.optim.optimizer import Optimizer

from braze.optim._extras import checked_decay

_COUNT = "ema_updates"


class WeightAverages(Optimizer):
    """Mixin: what a step needs to know of ``state[p]["ema"]``, and what becomes of it. How many updates there
    were is in ``param_groups[0]``, which checkpoints carry."""

    ema_decay: float | Callable[[int], float] | None
    ema_warmup: bool

    def _average_weight(self) -> float:
        """1 - decay, of the new weights in their average; -1 where there is none."""
        decay = self.ema_decay
        if decay is None:
            return -1.0
        updates = int(self.param_groups[0].get(_COUNT, 0))
        if callable(decay):
            decay = checked_decay(decay(updates), "ema_decay's result")
        if self.ema_warmup:
            decay = min(decay, (1 + updates) / (10 + updates))
        return 1.0 - decay

    def _count_average(self) -> None:
        group = self.param_groups[0]
        group[_COUNT] = int(group.get(_COUNT, 0)) + 1

    def ema_state_dict(self, model: torch.nn.Module) -> dict[str, Tensor]:
        """``model.state_dict()`` with the running averages in the place of the parameters.

        Buffers and parameters that no step has updated are the model's. Loads into the plain model.

        Args:
            model: has parameters of this optimizer.

        Raises:
            RuntimeError: ``ema_decay`` is None, and no checkpoint brought averages.
            ValueError: none of the model's parameters has an average.
        """
        averages = self._averages()
        state = model.state_dict(keep_vars=True)
        if not any(value in averages for value in state.values() if isinstance(value, Tensor)):
            raise ValueError(
                f"{type(self).__name__}.ema_state_dict: no parameter of the model has an average: "
                "none of them is this optimizer's, or no step has updated one yet"
            )
        for name, value in state.items():
            if isinstance(value, Tensor):
                state[name] = averages.get(value, value).detach().to(value.dtype)
        return state

    @contextmanager
    def swap_ema(self) -> Iterator[None]:
        """Within it the parameters hold their running averages, in the same memory: for evaluation.

        Raises:
            RuntimeError: as :meth:`ema_state_dict`.
        """
        averages = self._averages()
        weights = {p: p.detach().clone() for p in averages}
        try:
            with torch.no_grad():
                for p, average in averages.items():
                    p.copy_(average)
            yield
        finally:
            with torch.no_grad():
                for p, weight in weights.items():
                    p.copy_(weight)

    def _averages(self) -> dict[Tensor, Tensor]:
        parameters = chain.from_iterable(group["params"] for group in self.param_groups)
        averages = {p: self.state[p]["ema"] for p in parameters if "ema" in self.state.get(p, ())}
        if self.ema_decay is None and not averages:
            raise RuntimeError(
                f"{type(self).__name__} keeps no averages of the weights: construct it with "
                "ema_decay=0.999 or the like"
            )
        return averages
