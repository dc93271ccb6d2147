"""What the small study's cells say beside test accuracy, method by method.

    python benchmarks/facts.py tf_efficientnet_lite0 "allocate(budget='8%')" "lowrank(rank=16)"

Mean validation accuracy, of compressed domains before their tuning too, and at the rates where
both were tried that of norms at the backbone's and at each batch's statistics (seed 0); the share
of the adapters' numbers that each block has (all seeds). Reads the cells below benchmarks/results/
(`--of full`: of the study with every image) and trains nothing.
"""

import argparse
from collections import Counter

import numpy as np
from paired import is_backbone, ledger_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("backbone", help="a part of its name; with @ to mean weights of a file")
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--of", default="mini", help="whose cells: mini, full, or a study's --out")
    arguments = parser.parse_args()
    cells = [r for r in ledger_of(arguments.of).read().values() if r["kind"] == "cell"]
    cells = [r for r in cells if is_backbone(arguments.backbone, r["backbone"])]
    cells = [r for r in cells if r["study"] != "transfer"]
    for method in arguments.methods:
        tell(method, [r for r in cells if r["method"] == method])


def tell(method: str, cells: list[dict]) -> None:
    first = [r for r in cells if r["seed"] == 0]
    print(f"{method}: {len(cells)} cells, {len(first)} of seed 0")
    for key in ("untuned_val_accuracy", "val_accuracy"):
        if known := [100 * r[key] for r in first if key in r]:
            print(f"  {key:20} {np.mean(known):.1f}")
    pairs = [pair for record in first if (pair := by_statistics(record["trials"]))]
    if pairs:
        running, batch = (100 * np.mean(side) for side in zip(*pairs, strict=True))
        ahead = sum(pair[0] > pair[1] for pair in pairs)
        print(
            f"  norms at the backbone's statistics {running:.1f}, each batch's {batch:.1f}; ",
            end="",
        )
        print(f"ahead on {ahead} of {len(pairs)}")
    shares: Counter[str] = Counter()
    for record in cells:
        sites = record["site_numbers"] or {}
        for site, numbers in sites.items():
            shares[".".join(site.split(".")[:2])] += numbers / sum(sites.values()) / len(cells)
    for block, share in shares.items():
        print(f"  {block:20} {share:.1%}")


def by_statistics(trials: list[dict]) -> tuple[float, float] | None:
    """Validation accuracy (the backbone's, each batch's) at the first setting that both had."""
    found = {(t["lr"], t["decay"], t.get("norm_statistics")): t["val_accuracy"] for t in trials}
    for lr, decay, statistics in found:
        if statistics == "batch" and (lr, decay, "running") in found:
            return found[lr, decay, "running"], found[lr, decay, "batch"]
    return None


if __name__ == "__main__":
    main()
