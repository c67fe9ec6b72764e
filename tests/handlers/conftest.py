from __future__ import annotations

import multiprocessing
from multiprocessing.context import ForkServerContext

import pytest


@pytest.fixture(scope="session")
def server() -> ForkServerContext:
    """Real processes that need not import torch each time: they fork from one that has."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["handlers.train.job"])
    return context
