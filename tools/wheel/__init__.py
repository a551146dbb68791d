"""Builds braze's wheels: python -m tools.wheel --help."""
