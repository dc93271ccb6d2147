"""Invented rows of finished cells, for the tests of the report."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

DOMAINS = ("flowers", "signs", "digits", "faces")
SITES = ("stem", "layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1")
SHARE = {"head": 0, "parallel": 110_000, "lowrank(rank=8)": 20_000, "full": 1_000_000}


def invented_row(method: str, domain: str, seed: int, **changes: Any) -> dict[str, Any]:
    """A row whose accuracy is drawn from its own names, so that every call gives the same."""
    text = f"{method} {domain} {seed} {changes.get('per_class')} {changes.get('backbone')}"
    rng = np.random.default_rng(list(text.encode()))
    accuracy = round(float(rng.uniform(0.3, 0.95)), 4)
    row = {
        "study": "mini",
        "backbone": "resnet26(width=0.5)",
        "domain": domain,
        "method": method,
        "seed": seed,
        "n_train": 400,
        "per_class": None,
        "size_px": 48,
        "epochs": 15,
        "lr": 0.01,
        "decay": 0.05,
        "trials": [{"lr": lr, "decay": 0.05, "val_accuracy": 0.5} for lr in (0.001, 0.01)],
        "val_accuracy": accuracy,
        "test_accuracy": accuracy,
        "numbers": SHARE.get(method, 50_000),
        "head_numbers": 1285,
        "shared_numbers": 0,
        "backbone_numbers": 1_000_000,
        "seconds": 60.5,
        "site_change": None if method == "head" else dict(zip(SITES, rng.random(4), strict=True)),
        "site_numbers": None,
        "machine": "a machine",
        "threads": 1,
        "torch": "2.6.0",
    }
    return row | changes


@pytest.fixture(scope="session")
def row() -> Callable[..., dict[str, Any]]:
    """row(method, domain, seed, **changes): one invented cell."""
    return invented_row


@pytest.fixture(scope="session")
def table() -> Callable[..., list[dict[str, Any]]]:
    """table(methods, domains, seeds, **changes): every cell of a small study."""

    def make(
        methods: Any = tuple(SHARE), domains: Any = DOMAINS, seeds: Any = range(3), **changes: Any
    ) -> list[dict[str, Any]]:
        return [invented_row(m, d, s, **changes) for m in methods for d in domains for s in seeds]

    return make
