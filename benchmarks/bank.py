"""How long a bank takes to open and a domain to load, whatever the number of domains.

    python benchmarks/bank.py            about two minutes on one core; prints a Markdown table

Random weights: the numbers do not matter here. Every figure is a median and its spread (the
quartiles), one thread, files in the page cache. What to expect: opening grows with the manifest
(1,000 domains: below 0.1 s), loading does not grow, importing onetrunk costs about nothing on top
of torch.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import onetrunk as ot

N_DOMAINS = (3, 10, 100, 1000)  # three kinds of domain, then one of them under many names
FAMILIES = {"norm": ot.Norm(), "lowrank": ot.LowRank(32), "parallel": ot.Parallel()}
CLASSES = [f"class {i}" for i in range(10)]


def quartiles(call: Callable[[], object], n_times: int) -> str:
    """`median (first quartile to third)` in milliseconds, after two calls that do not count."""
    times_ms = []
    for _ in range(n_times + 2):
        start = time.perf_counter()
        call()
        times_ms.append(1e3 * (time.perf_counter() - start))
    return written(times_ms[2:])


def written(times_ms: list[float]) -> str:
    first, median, third = statistics.quantiles(times_ms, n=4)
    return f"{median:.1f} ({first:.1f} to {third:.1f})"


def banks(folder: Path, n_times: int = 40) -> None:
    backbone = ot.backbone("timm:resnet18", pretrained=False)
    models = {family: ot.attach(backbone, given, CLASSES) for family, given in FAMILIES.items()}
    bank = ot.Bank.create(folder / "bank", backbone)
    for family, model in models.items():
        bank.add(family, model, metrics={"test_accuracy": 0.9})
    loads = {family: bank.domains[family].size / 1e6 for family in models}
    head = " | ".join(f"load {family}, {size:.2f} MB" for family, size in loads.items())
    print(f"ResNet-18, {sum(t.numel() for t in backbone.parameters()) / 1e6:.1f} M numbers; ms\n")
    print(f"| domains | open, manifest alone | {head} |\n|---:|" + "---:|" * (1 + len(loads)))
    light, blob = bank._store.manifest.domains["norm"].card, bank._store.read("norm").blob
    for n_domains in N_DOMAINS:
        for i in range(len(bank.domains), n_domains):  # one blob under many names
            bank._store.add(f"domain-{i}", light, blob)
        opened = quartiles(lambda: ot.Bank.open(bank.path), n_times)
        cells = [quartiles(lambda name=name: bank.load(name), n_times) for name in models]
        print(f"| {len(bank.domains):,} | {opened} | {' | '.join(cells)} |", flush=True)


def attaching(n_times: int = 10) -> None:
    backbone = ot.backbone("timm:resnet50", pretrained=False)
    row = quartiles(lambda: ot.attach(backbone, ot.Parallel(), CLASSES), n_times)
    print(f"\nattach(resnet50, parallel), the dry run at 224 pixels included: {row} ms")


def importing(n_times: int = 7) -> None:
    """`import onetrunk` and what it really brings, on top of `import torch`; separate processes."""
    print("\n| in a process that has imported torch | ms more |\n|---|---:|")
    for name in ("", "; onetrunk.attach", "; onetrunk.Bank"):
        code = "import onetrunk" + name
        timed = (
            "import time, torch; start = time.perf_counter(); "
            f"{code}; print(1e3 * (time.perf_counter() - start))"
        )
        times_ms = [
            float(subprocess.run([sys.executable, "-c", timed], capture_output=True).stdout)
            for _ in range(n_times)
        ]
        print(f"| `{code}` | {written(times_ms)} |", flush=True)


def main() -> None:
    torch.set_num_threads(1)
    print(f"onetrunk {ot.__version__}, torch {torch.__version__}, one thread\n")
    with tempfile.TemporaryDirectory() as folder:
        banks(Path(folder))
    attaching()
    importing()


if __name__ == "__main__":
    main()
