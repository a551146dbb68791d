"""All suites in one run. train and infer need torchvision and are left out without it, which is said."""

from __future__ import annotations

import argparse

from . import conv, conv_kernels, dropout, infer, models, norm, optim, session, train


def add_arguments(parser: argparse.ArgumentParser) -> None:
    session.add_options(parser, "each suite's")


def run(arguments: argparse.Namespace) -> int:
    """Returns :func:`session.run`'s code."""
    suites = [optim.SUITE, norm.SUITE, dropout.SUITE, conv.SUITE, conv_kernels.SUITE]
    if models.is_installed("torchvision"):
        suites += [train.SUITE, infer.SUITE]
    else:
        print("torchvision is not installed: no whole models (train, infer)")
    return session.run(suites, arguments)
