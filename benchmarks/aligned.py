"""What an adapter's start and size are worth: methods x rates x domains, on held-out images.

    python benchmarks/aligned.py --workers 2         every training that is missing, then the table

The small study's trainings (EfficientNet-Lite0, from the linear probe's head) on up to 320 images,
and on five a class. Of a method's rates, validation images choose one a domain and seed. Accuracy
is that on images that no training saw: at most 400 each of the rest of a domain's training and
validation images. Test images are left alone. Needs ONETRUNK_DATA; results are appended to
benchmarks/results/aligned.jsonl.
"""

import argparse
import dataclasses
import json
import multiprocessing
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ratios import DATA, TRUNK, accuracy_on, setting_and_rest

import onetrunk as ot
from onetrunk.benchmark import cells
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import SMALL, Tuning
from onetrunk.benchmark.report.summary import interval
from onetrunk.benchmark.studies import BASE

RESULTS = Path(__file__).parent / "results" / "aligned.jsonl"
FEW = 5  # images a class
SLOW = "omniglot"  # 242 classes: a training takes as long as those of all others


@dataclass(frozen=True)
class Training:
    """One training; `per_class` None: up to 320 images of all classes."""

    method: str
    factor: float  # on the recipe's learning rates
    domain: str
    per_class: int | None = None
    seed: int = 0

    def run(self) -> dict[str, object]:
        """Its accuracy on validation and held-out images."""
        keep = "best" if self.per_class is None else "late"
        protocol = dataclasses.replace(SMALL, per_class=self.per_class, keep=keep)
        setting, held_out = setting_and_rest(self.domain, TRUNK, protocol, self.seed)
        model = cells.fresh(read_method(self.method), setting)
        tuning = Tuning(self.factor, *dataclasses.astuple(protocol.start)[1:])
        recipe = protocol.recipe(tuning, self.seed, protocol.n_epochs(len(setting.train)))
        graphed = torch.cuda.is_available()
        for _ in ot.fit(model, setting.train, recipe, val=setting.val, graphed=graphed):
            pass
        return {
            **dataclasses.asdict(self),
            "numbers": cells.numbers_of(model)["numbers"],
            "val_accuracy": round(ot.evaluate(model, setting.val).accuracy, 4),
            "accuracy": round(accuracy_on(model, held_out), 4),
            "machine": torch.cuda.get_device_name() if graphed else "CPU",
        }


LOW, ONE, HIGH = 1 / 3, 1.0, 3.0
RATES = {
    "full": (LOW, ONE),
    "lowrank(rank=16)": (LOW, ONE, HIGH),
    "lowrank(rank=16, init='aligned')": (LOW**2, LOW, ONE),
    "lowrank(rank=22, init='aligned')": (LOW, ONE),
    "allocate(budget='1%')": (LOW, ONE),
    "allocate(budget='1%', init='aligned')": (LOW, ONE),
    "allocate(budget='8%', init='aligned')": (LOW, ONE),
}
WITH_FEW = ("full", "lowrank(rank=16)", "lowrank(rank=16, init='aligned')")
SEEDS_WITH_FEW = (0, 1)


def trainings(domains: list[str]) -> list[Training]:
    """Of every domain, with all images and with few."""
    many = [Training(m, f, d) for m, factors in RATES.items() for f in factors for d in domains]
    few = [
        Training(m, f, d, FEW, seed)
        for m in WITH_FEW for f in RATES[m] for seed in SEEDS_WITH_FEW for d in domains
    ]  # fmt: skip
    return many + few


def results() -> dict[Training, dict]:
    if not RESULTS.exists():
        return {}
    names = [field.name for field in dataclasses.fields(Training)]
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    return {Training(**{name: row[name] for name in names}): row for row in rows}


def chosen(method: str, per_class: int | None) -> dict[tuple[str, int], dict]:
    """(domain, seed) -> the training whose rate did best on validation images."""
    best: dict[tuple[str, int], dict] = {}
    for training, row in results().items():
        if (training.method, training.per_class) == (method, per_class):
            key = training.domain, training.seed
            if key not in best or row["val_accuracy"] > best[key]["val_accuracy"]:
                best[key] = row
    return best


def table() -> Iterator[str]:
    """Means, and how far every method is above fine-tuning on the same domains and seeds."""
    yield "| images | method | domains, seeds | numbers | accuracy, % | over fine-tuning | wins |"
    yield "|---|---|---:|---:|---:|---:|---:|"
    for per_class in (None, FEW):
        full = chosen("full", per_class)
        for method in RATES:
            rows = chosen(method, per_class)
            if not rows:
                continue
            gains = [100 * (rows[k]["accuracy"] - full[k]["accuracy"]) for k in rows if k in full]
            low, high = interval(gains) or (0.0, 0.0)
            numbers = np.mean([row["numbers"] for row in rows.values()])
            mean = 100 * np.mean([row["accuracy"] for row in rows.values()])
            yield (
                f"| {'up to 320' if per_class is None else f'{per_class} a class'} | {method} "
                f"| {len(rows)} | {numbers:,.0f} | {mean:.1f} "
                f"| {np.mean(gains):+.1f} ({low:+.1f} to {high:+.1f}) "
                f"| {sum(gain > 0 for gain in gains)} of {len(gains)} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, a training each")
    arguments = parser.parse_args()
    known = results()
    domains = sorted(p.name for p in DATA.iterdir() if p.is_dir() and p.name not in (BASE, SLOW))
    todo = [training for training in trainings(domains) if training not in known]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, context, torch.set_num_threads, (1,)) as pool:
        for future in as_completed([pool.submit(training.run) for training in todo]):
            with RESULTS.open("a") as file:
                file.write(json.dumps(future.result()) + "\n")
            print(future.result(), flush=True)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
