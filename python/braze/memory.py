"""Results on the CPU above 1 MiB get the memory of earlier ones, of which up to 512 MiB are kept.

The operating system clears every page that it gives out, which takes longer than a kernel that fills it. Unlike
``torch.cuda``'s, the cache does not add to the peak: what would not fit into it is given back.
"""

from __future__ import annotations

from braze._native import _C


def set_reuse(on: bool) -> None:
    """Whether results get earlier ones' memory; ``False`` also gives back what is kept.

    ``BRAZE_REUSE_MEMORY=0`` in the environment starts without.
    """
    _C.set_memory_reuse(on)


def reuse() -> bool:
    """Whether results get earlier ones' memory."""
    return _C.memory_reuse()


def kept() -> int:
    """Bytes that are kept for later results and that no tensor uses."""
    return _C.memory_kept()


def empty_cache() -> None:
    """Gives back what is kept, as :func:`torch.cuda.empty_cache` does."""
    _C.empty_memory_cache()
