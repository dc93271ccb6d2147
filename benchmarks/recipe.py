"""Which default recipe trains well untuned: backbones x domains x sizes x candidates.

    python benchmarks/recipe.py --stage pretrain     the small ViT and ConvNeXt, on tiny_imagenet
    python benchmarks/recipe.py --stage main         every cell, one after another; resumes
    python benchmarks/recipe.py --stage small        the same on the two pretrained here
    python benchmarks/recipe.py --stage large        20,800 images
    python benchmarks/recipe.py --stage statistics   norms at the backbone's statistics or a batch's
    python benchmarks/recipe.py --stage rates        the same at several learning rates, 300 and all
    python benchmarks/recipe.py --stage ratios       slower heads and inner factors, 300 and all
    python benchmarks/recipe.py --stage table        the table of docs/recipes.md

Needs ONETRUNK_DATA (a folder of Parquet domains); the ResNets' weights are beside it, in weights/.
The cells are in recipe_cells.json. Each is trained once, validation chooses the epoch, test is
scored once; results are appended to benchmarks/results/recipe.jsonl, a line a cell.
"""

import argparse
import dataclasses
import hashlib
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import onetrunk as ot
from onetrunk.data import Prepared, Preprocessing, load
from onetrunk.training.fit import best_device
from onetrunk.training.probe import linear_probe, start_from_probe

DATA = Path(os.environ.get("ONETRUNK_DATA", "../shared/data/mini-decathlon"))
HERE = Path(__file__).parent
RESULTS = HERE / "results" / "recipe.jsonl"
WEIGHTS = Path("scratch/recipe")  # pretrained here, not committed: the first stage makes them again

VIT = dict(img_size=64, patch_size=8, embed_dim=128, depth=6, num_heads=4)
CONVNEXT = dict(depths=(2, 2, 4, 2), dims=(32, 64, 128, 256), patch_size=2)


def cifar_resnet(depth: int) -> nn.Module:
    """He et al.'s CIFAR ResNet with parameter-free shortcuts, as the stored weights want it."""
    return CifarResNet((depth - 2) // 6)


class CifarBlock(nn.Module):
    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.grows = cin != cout
        self.conv1 = nn.Conv2d(cin, cout, 3, 2 if self.grows else 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(cout)
        self.conv2 = nn.Conv2d(cout, cout, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(cout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.grows:
            quarter = y.shape[1] // 4
            x = nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, quarter, quarter))
        return (y + x).relu()


class CifarResNet(nn.Module):
    def __init__(self, n_blocks: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        for stage, (cin, cout) in enumerate([(16, 16), (16, 32), (32, 64)], 1):
            blocks = [CifarBlock(cin if k == 0 else cout, cout) for k in range(n_blocks)]
            setattr(self, f"layer{stage}", nn.Sequential(*blocks))
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)).relu())))
        return self.linear(x.mean((2, 3)))


def load_backbone(name: str) -> nn.Module:
    if name == "efficientnet":
        return ot.backbone("timm:tf_efficientnet_lite0")
    if name.startswith("resnet"):
        model = cifar_resnet(int(name.removeprefix("resnet")))
        model.load_state_dict(load_file(DATA.parent / "weights" / f"cifar10_{name}.safetensors"))
        return model.eval()
    model = fresh(name)
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()


def fresh(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "vit":
        return timm.create_model("vit_tiny_patch16_224", num_classes=100, **VIT)
    return timm.create_model("convnext_atto", num_classes=100, **CONVNEXT)


def pretrain(name: str, epochs: int) -> None:
    path = WEIGHTS / f"{name}.safetensors"
    if path.exists():
        return
    splits, size = load(DATA / "tiny_imagenet"), 64
    preprocessing = Preprocessing(size_px=size, crop_ratio=64 / 72)
    model = ot.attach(
        fresh(name), ot.Full(), splits.classes, preprocessing=preprocessing, input_size=(3, 64, 64)
    )
    recipe = ot.Recipe(epochs=epochs, batch_size=64, lr=1e-3, lr_full=1e-3, crop_scale=(0.4, 1.0))
    start = time.time()
    for step in ot.fit(model, splits.train, recipe):
        if step.step % 100 == 0:
            seconds = time.time() - start
            print(f"{name} {step.step}/{step.n_steps} {step.loss:.3f} {seconds:.0f} s", flush=True)
    accuracy = ot.evaluate(model, splits.val).accuracy
    WEIGHTS.mkdir(parents=True, exist_ok=True)
    save_file({n: t.contiguous() for n, t in model.state_dict().items()}, path)
    print(f"{name}: accuracy {accuracy:.3f} on tiny_imagenet's validation images", flush=True)


@dataclasses.dataclass(frozen=True)
class Cell:
    backbone: str
    domain: str
    n_images: int  # at most so many training images, the first of each class
    family: str
    recipe: str
    size_px: int
    start: str = "fresh"  # the head: "fresh", or the linear "probe"

    @property
    def key(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]


def run(cell: Cell) -> dict[str, object]:
    splits = load(DATA / cell.domain)
    backbone = load_backbone(cell.backbone).to(best_device())
    preprocessing = Preprocessing.for_backbone(
        backbone, size_px=cell.size_px, hflip=bool(splits.hflip)
    )
    train = Prepared(first_of_each_class(splits.train, cell.n_images), preprocessing)
    val = Prepared(first_of_each_class(splits.val, cell.n_images // 2), preprocessing)
    test = Prepared(splits.test, preprocessing)
    start = time.time()
    size = (3, cell.size_px, cell.size_px)
    if cell.family == "probe":
        model = linear_probe(backbone, train, val, splits.classes, preprocessing=preprocessing)
        best = ot.evaluate(model, val).accuracy
    else:
        family = None if cell.family == "default" else ot.read_family(cell.family)
        model = ot.attach(
            backbone, family, splits.classes, preprocessing=preprocessing, input_size=size
        )
        if cell.start == "probe":
            start_from_probe(
                model,
                linear_probe(backbone, train, val, splits.classes, preprocessing=preprocessing),
            )
        best = 0.0
        recipe, graphed = ot.read_recipe(cell.recipe), torch.cuda.is_available()
        for step in ot.fit(model, train, recipe, val=val, graphed=graphed):
            best = max(best, step.val_accuracy or 0.0)
    return {
        **dataclasses.asdict(cell),
        "key": cell.key,
        "trained": model.domain.family,
        "val": best,
        "test": ot.evaluate(model, test).accuracy,
        "n_train": len(train),
        "seconds": round(time.time() - start, 1),
        "threads": torch.get_num_threads(),
        "machine": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
    }


def first_of_each_class(images, n: int):
    if n >= len(images):
        return images
    share = n / len(images)
    rows = []
    for label in images.labels.unique():
        own = (images.labels == label).nonzero().flatten().tolist()
        rows += own[: max(2, round(share * len(own)))]
    return images.subset(sorted(rows))


def cells(stage: str) -> list[Cell]:
    return [
        Cell(**values) for values in json.loads((HERE / "recipe_cells.json").read_text())[stage]
    ]


def table() -> None:
    """Every cell, then the means over domains where one setting has several."""
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    print("| backbone | domain | images | family | recipe | head | val | test |")
    print("|---|---|---|---|---|---|---|---|")
    settings: dict[tuple[str, ...], list[dict]] = {}
    for row in rows:
        asked = "300" if row["n_images"] == 300 else "all"
        own = (row["trained"], row["recipe"], row["start"])
        tell(row["backbone"], row["domain"], row["n_train"], *own, rows=[row])
        settings.setdefault((row["backbone"], asked, *own), []).append(row)
    for (backbone, asked, *own), same in settings.items():
        if len(same) > 1:
            tell(backbone, f"mean of {len(same)}", asked, *own, rows=same)


def tell(*facts: object, rows: list[dict]) -> None:
    val, test = (sum(row[part] for row in rows) / len(rows) for part in ("val", "test"))
    print("|", " | ".join(map(str, facts)), f"| {val:.3f} | {test:.3f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stage", default="main")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1, help="processes, a cell each")
    arguments = parser.parse_args()
    if arguments.stage == "table":
        table()
        return
    if arguments.stage == "pretrain":
        torch.set_num_threads(arguments.threads)
        pretrain("convnext", epochs=6)
        pretrain("vit", epochs=10)
        return
    done = (
        {json.loads(line)["key"] for line in RESULTS.read_text().splitlines()}
        if RESULTS.exists()
        else set()
    )
    RESULTS.parent.mkdir(exist_ok=True)
    todo = [cell for cell in cells(arguments.stage) if cell.key not in done]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        arguments.workers, context, torch.set_num_threads, (arguments.threads,)
    ) as pool:
        for future in as_completed([pool.submit(run, cell) for cell in todo]):
            row = future.result()
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
