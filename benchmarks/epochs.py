"""Which epoch's network to keep: rules x domains x numbers of images, one training for all rules.

    python benchmarks/epochs.py --workers 2         every training that is missing, then the table

The small study's trainings (from the linear probe's head, at the recipe's rates) with five images
a class, and with up to 320 images. Every rule sees the same accuracies on validation images; what
it keeps is scored on images that neither saw: at most 400 each of the rest of a domain's training
and validation images. Test images are left alone. Needs ONETRUNK_DATA; results are appended to
benchmarks/results/epochs.jsonl.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ratios import TRUNK, accuracy_on, setting_and_rest
from rows import add_missing, known

import onetrunk as ot
from onetrunk.benchmark import cells
from onetrunk.benchmark.methods import read_method
from onetrunk.benchmark.protocol import SMALL
from onetrunk.core.domain import delta
from onetrunk.training.fit import standard_error

RESULTS = Path(__file__).parent / "results" / "epochs.jsonl"
RESNET26 = "resnet26(width=0.5)"
DOMAINS = ("satellite", "trash", "brain_mri", "flowers", "sketch", "cifar10", "gtsrb", "mnist")


@dataclass(frozen=True)
class Training:
    """One training; `per_class` None: up to 320 images of all classes."""

    trunk: str
    method: str
    domain: str
    per_class: int | None
    seed: int = 0

    def run(self) -> dict[str, object]:
        """The accuracy of what each rule keeps."""
        protocol = dataclasses.replace(
            SMALL, per_class=self.per_class, size_px=32 if self.trunk == RESNET26 else SMALL.size_px
        )
        setting, held_out = setting_and_rest(self.domain, self.trunk, protocol, self.seed)
        model = cells.fresh(read_method(self.method), setting)
        states = [{name: tensor.clone() for name, tensor in delta(model).items()}]
        accuracies = [ot.evaluate(model, setting.val).accuracy]
        recipe = protocol.recipe(protocol.start, self.seed, protocol.n_epochs(len(setting.train)))
        for step in ot.fit(model, setting.train, recipe, val=setting.val):
            if step.val_accuracy is not None:
                states.append({name: tensor.clone() for name, tensor in delta(model).items()})
                accuracies.append(step.val_accuracy)
        kept = {name: rule(accuracies, len(setting.val)) for name, rule in RULES.items()}
        scores = {}
        for epoch in {0, *kept.values()}:
            with torch.no_grad():
                for name, tensor in delta(model).items():
                    tensor.copy_(states[epoch][name])
            scores[epoch] = round(accuracy_on(model, held_out), 4)
        return {
            **dataclasses.asdict(self),
            "val_images": len(setting.val),
            "epochs": recipe.epochs,
            "kept": kept,
            "probe": scores[0],
            "accuracy": {name: scores[epoch] for name, epoch in kept.items()},
        }


def within(errors: float) -> Callable[[list[float], int], int]:
    """The latest epoch no more than so many standard errors below the best, nor below the start."""

    def rule(found: list[float], n_images: int) -> int:
        best = max(found[1:])
        least = max(found[0], best - errors * standard_error(best, n_images))
        return max((epoch for epoch in range(1, len(found)) if found[epoch] >= least), default=0)

    return rule


def first_of_the_best(found: list[float], n_images: int) -> int:
    best = max(found[1:])
    return found.index(best, 1) if best >= found[0] else 0


RULES = {
    "first of the best": first_of_the_best,
    "last of the best": within(0),
    "latest within one error": within(1),
    "latest within two": within(2),
    "the end": lambda found, n_images: len(found) - 1,
}


def trainings() -> list[Training]:
    """A backbone's all, with few images first."""
    return [
        Training(trunk, method, domain, per_class)
        for trunk, adapters in ((TRUNK, "lowrank(rank=16)"), (RESNET26, "parallel"))
        for per_class in (5, None)
        for domain in DOMAINS
        for method in ("full", adapters)
    ]


def table() -> Iterator[str]:
    """Mean accuracy over the domains in per cent; what `fit` keeps over the first of the best."""
    found = known(RESULTS, Training)
    yield f"| backbone | method | images | trainings | {' | '.join(RULES)} | within two, gain |"
    yield f"|---|---|---|---:|{'---:|' * (len(RULES) + 1)}"
    kinds = dict.fromkeys((t.trunk, t.method, t.per_class) for t in trainings())
    for trunk, method, per_class in kinds:
        rows = [
            row
            for t, row in found.items()
            if (t.trunk, t.method, t.per_class) == (trunk, method, per_class)
        ]
        if rows:
            means = [100 * np.mean([row["accuracy"][name] for row in rows]) for name in RULES]
            images = "up to 320" if per_class is None else f"{per_class} a class"
            cells_of_row = " | ".join(f"{mean:.1f}" for mean in means)
            first, _, _, late, _ = RULES
            gains = [100 * (row["accuracy"][late] - row["accuracy"][first]) for row in rows]
            cells_of_row += f" | {min(gains):+.1f} to {max(gains):+.1f}"
            yield f"| {trunk} | {method} | {images} | {len(rows)} | {cells_of_row} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="processes, a training each")
    arguments = parser.parse_args()
    add_missing(RESULTS, trainings(), arguments.workers)
    print("\n".join(table()))


if __name__ == "__main__":
    main()
