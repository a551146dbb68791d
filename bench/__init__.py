"""Benchmarks: ``python -m braze bench NAME``. Ratios, ours and torch interleaved in one run."""
