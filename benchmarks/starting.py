"""How long it takes to attach and to load a domain, and what importing onetrunk adds to torch.

    python benchmarks/starting.py        under a minute on one core; prints a Markdown table

Random weights: the numbers do not matter here. Every figure is a median and its spread (the
quartiles), one thread, files in the page cache.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

import onetrunk as ot

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


def attaching(n_times: int = 10) -> None:
    backbone = ot.backbone("timm:resnet50", pretrained=False)
    row = quartiles(lambda: ot.attach(backbone, ot.Parallel(), CLASSES), n_times)
    print(f"\nattach(resnet50, parallel), the dry run at 224 pixels included: {row} ms")


def loading(n_times: int = 60) -> None:
    backbone = ot.backbone("timm:resnet18", pretrained=False)
    with tempfile.TemporaryDirectory() as folder:
        bank = ot.Bank.create(f"{folder}/bank", backbone)
        bank.add("domain", ot.attach(backbone, ot.LowRank(32), CLASSES, input_size=(3, 64, 64)))
        megabytes = bank.domains["domain"].size / 1e6
        row = quartiles(lambda: bank.load("domain"), n_times)
    print(f"\nbank.load(resnet18, lowrank(rank=32)), {megabytes:.1f} MB: {row} ms")


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
    attaching()
    loading()
    importing()


if __name__ == "__main__":
    main()
