"""Does a measured plan beat the uniform one at equal budget? Measures x domains x budgets x seeds.

    python benchmarks/allocation.py                     every cell, one after another; resumes
    python benchmarks/allocation.py --domains gtsrb --ranks 1 --seeds 0      some of them
    python benchmarks/allocation.py --table             the tables of docs/allocation.md

Needs ONETRUNK_DATA (a folder of Parquet domains). EfficientNet-Lite0 with its packaged ImageNet
weights, 48 px, about 300 training images, 10 epochs of the default recipe. A budget is what the
uniform plan of rank 1, 2 or 4 costs: 0.49, 0.97 and 1.9 % of the backbone. Validation chooses the
epoch, test is scored once; results are appended to benchmarks/results/allocation.jsonl, a line a
cell. A cell takes about a minute and a half on one core.
"""

import argparse
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
from torch import nn

import onetrunk as ot
from onetrunk.core.allocate import Allocation, allocate, uniform
from onetrunk.core.plan import Where
from onetrunk.core.sensitivity import Sensitivity
from onetrunk.data import Images, Prepared, Preprocessing, load
from onetrunk.training.probe import linear_probe
from onetrunk.training.sensitivity import sensitivity

DATA = Path(os.environ.get("ONETRUNK_DATA", "../shared/data/mini-decathlon"))
RESULTS = Path(__file__).parent / "results" / "allocation.jsonl"
DOMAINS = ("gtsrb", "satellite", "dtd", "sketch", "scene_chars")
METHODS = (
    "uniform", "curvature", "gradient", "trained", "uniform@all", "curvature@auto", "gradient@auto",
)  # fmt: skip
RANKS, SEEDS = (1, 2, 4), (0, 1, 2)
N_TRAIN, N_VAL, N_TEST, SIZE_PX, EPOCHS = 300, 150, 600, 48, 10
SIZE = (3, SIZE_PX, SIZE_PX)


@dataclasses.dataclass(frozen=True)
class Cell:
    domain: str
    method: str  # who plans, and over which layers: all of them, or those of `Where()`
    rank: int  # the budget is what this rank costs everywhere
    seed: int
    epochs: int = EPOCHS


@functools.cache
def backbone() -> nn.Module:
    return ot.backbone("timm:tf_efficientnet_lite0").to(memory_format=torch.channels_last)


@functools.cache
def budget(rank: int) -> int:
    """Numbers of the uniform plan of one rank."""
    sites = uniform(backbone(), 10**9, input_size=SIZE).shares
    plan = {share.site: ot.LowRank(rank) for share in sites}
    return ot.cost(ot.attach(backbone(), plan, ["a", "b"], input_size=SIZE)).adapters


@functools.cache
def data(domain: str) -> tuple[Prepared, Prepared, Prepared]:
    splits = load(DATA / domain)
    seen = Preprocessing.for_backbone(backbone(), SIZE_PX, hflip=bool(splits.hflip))
    parts = ((splits.train, N_TRAIN), (splits.val, N_VAL), (splits.test, N_TEST))
    return tuple(Prepared(spread(images, n), seen) for images, n in parts)


def spread(images: Images, n: int) -> Images:
    """About n images, the first of each class, every class in its share."""
    share = min(1.0, n / len(images))
    rows: list[int] = []
    for label in images.labels.unique():
        own = (images.labels == label).nonzero().flatten().tolist()
        rows += own[: max(2, round(share * len(own)))]
    return images.subset(sorted(rows))


def attached(domain: str, family: object, seed: int, where: Where | None = None) -> nn.Module:
    train, _, _ = data(domain)
    return ot.attach(
        backbone(), family, train.classes, where=where, preprocessing=train.preprocessing,
        input_size=SIZE, seed=seed,
    )  # fmt: skip


def trained(model: nn.Module, domain: str, seed: int, epochs: int) -> float:
    """Trains in place; the best accuracy on validation."""
    train, val, _ = data(domain)
    steps = ot.fit(model, train, ot.Recipe(epochs=epochs, seed=seed), val=val)
    return max(step.val_accuracy or 0.0 for step in steps)


@functools.lru_cache(maxsize=4)
def measured(domain: str, by: str, seed: int, epochs: int) -> Sensitivity:
    """Only `trained` depends on seed and epochs."""
    train, val, _ = data(domain)
    if by == "trained":
        model = attached(domain, ot.Parallel(), seed, Where(layers="all"))
        trained(model, domain, seed, epochs)
    else:
        model = linear_probe(
            backbone(), train, val, train.classes, preprocessing=train.preprocessing
        )
    return sensitivity(model, train, by=by)


def planned(cell: Cell) -> Allocation:
    by, _, where = cell.method.partition("@")
    numbers = budget(cell.rank)
    if by == "uniform":
        chosen = Where(layers="all") if where == "all" else Where()
        return uniform(backbone(), numbers, chosen, SIZE)
    training = (cell.seed, cell.epochs) if by == "trained" else (0, 0)
    found = measured(cell.domain, by, *training)
    return allocate(backbone(), found, numbers, Where() if where == "auto" else None)


def run(cell: Cell) -> dict[str, object]:
    start = time.time()
    allocation = planned(cell)
    planned_s = time.time() - start
    model = attached(cell.domain, allocation.plan, cell.seed)
    val = trained(model, cell.domain, cell.seed, cell.epochs)
    return {
        **dataclasses.asdict(cell),
        "budget": allocation.budget,
        "numbers": allocation.numbers,
        "sites": len(allocation.plan),
        "val": val,
        "test": ot.evaluate(model, data(cell.domain)[2]).accuracy,
        "planned_s": round(planned_s, 1),
        "seconds": round(time.time() - start, 1),
        "threads": torch.get_num_threads(),
    }


def rows() -> list[dict[str, object]]:
    return (
        [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    )


def table() -> None:
    """Test accuracy by method and budget, and points above `uniform` over the cells of both."""
    found = {tuple(row[f.name] for f in dataclasses.fields(Cell)): row["test"] for row in rows()}
    print("| method | budget: rank | cells | test | points above uniform | better in |")
    print("|---|---|---|---|---|---|")
    for rank, method in product((*RANKS, None), METHODS):
        pairs = list(_paired(found, method, rank))
        if not pairs:
            continue
        gains = [100 * (ours - theirs) for ours, theirs in pairs]
        error = stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else float("nan")
        better = sum(gain > 0 for gain in gains)
        print(
            f"| {method} | {rank or 'all'} | {len(pairs)} | {mean(p[0] for p in pairs):.3f} "
            f"| {mean(gains):+.1f} +- {error:.1f} | {better} |"
        )


def _paired(
    found: dict[tuple[object, ...], float], method: str, rank: int | None
) -> Iterator[tuple[float, float]]:
    for (domain, name, budgeted, *training), test in found.items():
        uniform_test = found.get((domain, "uniform", budgeted, *training))
        if name == method and rank in (None, budgeted) and uniform_test is not None:
            yield test, uniform_test


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--domains", nargs="+", default=DOMAINS)
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--ranks", nargs="+", type=int, default=RANKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=SEEDS)
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    asked = parser.parse_args()
    if asked.table:
        table()
        return
    torch.set_num_threads(asked.threads)
    done = {tuple(row[f.name] for f in dataclasses.fields(Cell)) for row in rows()}
    RESULTS.parent.mkdir(exist_ok=True)
    # seeds outermost: stopped early, every domain and method has as many
    for seed, domain, method, rank in product(
        asked.seeds, asked.domains, asked.methods, asked.ranks
    ):
        cell = Cell(domain, method, rank, seed, asked.epochs)
        if dataclasses.astuple(cell) in done:
            continue
        row = run(cell)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


if __name__ == "__main__":
    main()
