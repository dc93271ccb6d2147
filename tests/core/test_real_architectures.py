"""Forty of timm's architectures keep the laws: the sweep's fixed sample, two families each.

`python benchmarks/sweep.py --all` runs every family over every small CNN; see docs/support.md.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _sweep() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "sweep.py"
    spec = importlib.util.spec_from_file_location("sweep", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sweep = _sweep()


def test_the_sample_is_forty_different_models() -> None:
    assert len(set(sweep.SAMPLE)) == len(sweep.SAMPLE) == 40


@pytest.mark.filterwarnings("ignore:Overwriting .* in registry:UserWarning")
@pytest.mark.parametrize("name", sweep.SAMPLE)
def test_a_real_architecture_keeps_the_laws(name: str) -> None:
    row = sweep.check(name, tried=("parallel", "default"))
    assert sweep.problems(row) == []
    assert row["sites"] > 0 and row["families"]["parallel"]["n"] == row["sites"]
