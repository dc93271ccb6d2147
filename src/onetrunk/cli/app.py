"""The commands: argv -> values -> calls. Heavy imports happen inside the command that needs them.

Exit status: 0; 1 for a failure, with one line on standard error that says what to do (Ctrl-C too);
2 for wrong usage.
"""

import errno
import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import BankError, OnetrunkError
from .benchmarking import benchmark
from .console import UNTRAINED, Screen, counted, percent, size
from .options import (
    AsJson,
    BankPath,
    Device,
    Domain,
    Epochs,
    Flip,
    Layers,
    NormsOf,
    Pattern,
    Recipes,
    Replace,
    Resume,
    Seed,
    Shares,
    SizePx,
    Source,
    Squash,
    Stages,
)

if TYPE_CHECKING:
    from ..bank.bank import Bank, Card
    from ..core.adapters import Family
    from ..core.basis import Basis
    from ..core.plan import Plan, Where
    from ..training.recipe import Recipe

app = typer.Typer(
    name="onetrunk",
    help="One vision network, many domains: a frozen backbone, a few per cent for each domain.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(benchmark)

CTRL_C = 130  # what the parser returns instead of raising KeyboardInterrupt
RESUMES = "stopped; nothing half-written is left. A training goes on with --resume."
STOPPED = {  # what is said of a Ctrl-C, by the command
    "train": RESUMES,
    "allocate": RESUMES,
    "pretrain": RESUMES,
    "compress": "stopped.",  # it says the rest itself
    "benchmark": "stopped. What is finished is kept: the same command goes on from there.",
}


def _version(asked: bool) -> None:
    if asked:
        from .. import __version__

        typer.echo(f"onetrunk {__version__}")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")
    ] = False,
) -> None:
    """One vision network, many domains: a frozen backbone, a few per cent for each domain."""


@app.command()
def quickstart(
    out: Annotated[Path, typer.Option(help="The bank's folder.")] = Path("quickstart.bank"),
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the chosen number.")] = None,
    as_json: AsJson = False,
) -> None:
    """Several real domains on one ImageNet backbone, in minutes and without a network.

    Example: onetrunk quickstart --out demo.bank
    """
    from .quickstart import run

    run(out, Screen(as_json), epochs)


@app.command()
def pretrain(
    backbone: Annotated[
        str, typer.Argument(metavar="BACKBONE", help="resnet26(width=0.5), timm:NAME ...")
    ],
    data: Source,
    out: Annotated[Path, typer.Option(help="The safetensors file to write.")],
    adapter: Annotated[
        str | None,
        typer.Option(metavar="FAMILY", help="In place while the weights are trained: series."),
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Start from this safetensors file, not at random.")
    ] = None,
    recipe: Recipes = "pretrain",
    epochs: Epochs = None,
    seed: Seed = None,
    size_px: SizePx = None,
    flip: Flip = None,
    half: Annotated[bool, typer.Option("--half", help="Store float16.")] = False,
    merge: Annotated[
        bool, typer.Option("--merge", help="Fold the adapters in; else they are left out.")
    ] = False,
    resume: Resume = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a backbone itself; on several GPUs or processes with torchrun -m onetrunk pretrain.

    Example: onetrunk pretrain "resnet26(width=0.5)" --data photos --out trunk.safetensors
    """
    from ..core.adapters import read_family
    from .pretraining import Request
    from .pretraining import pretrain as run

    screen = Screen(as_json)
    request = Request(
        backbone=backbone,
        data=data,
        out=out,
        recipe=_recipe(recipe, epochs, seed),
        adapter=None if adapter is None else read_family(adapter),
        weights=weights,
        size_px=size_px,
        flip=flip,
        half=half,
        merge=merge,
        resume=resume,
        device=None if device is None else _device(device),
    )
    run(request, screen)


@app.command()
def new(
    bank: BankPath,
    backbone: Annotated[
        str,
        typer.Option(metavar="NAME", help="timm:NAME, torchvision:NAME or resnet26(width=0.5)."),
    ] = "timm:tf_efficientnet_lite0",
    weights: Annotated[
        Path | None, typer.Option(help="A safetensors file with the backbone's weights.")
    ] = None,
    by_reference: Annotated[
        bool, typer.Option("--by-reference", help="Store the name, not the weights.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Make a bank around a backbone.

    Example: onetrunk new garden.bank --backbone timm:resnet18.a1_in1k
    """
    from ..backbones import backbone as build_backbone
    from ..backbones.written_form import is_untrained
    from ..bank.bank import Bank

    screen = Screen(as_json)
    if by_reference and weights is not None:
        raise BankError(
            "--by-reference stores the backbone's name only, which does not bring back --weights "
            f"{weights}. Leave --by-reference out."
        )
    made = Bank.create(bank, build_backbone(backbone, weights=weights), by_reference=by_reference)
    screen.say(f"{bank}: {made.backbone_form}, fingerprint {made.backbone_fingerprint[:12]}")
    if is_untrained(backbone, weights):
        screen.warn(UNTRAINED)
    screen.finish(
        {
            "bank": str(bank),
            "backbone": made.backbone_form,
            "fingerprint": made.backbone_fingerprint,
        }
    )


@app.command()
def train(
    bank: BankPath,
    domain: Domain,
    data: Source,
    adapter: Annotated[
        str | None,
        typer.Option(
            metavar="FAMILY",
            help="series, parallel, lowrank(rank=8), channelwise, norm, full or head; by default "
            "what fits the backbone.",
        ),
    ] = None,
    stages: Stages = "early,mid,late",
    convs: Annotated[str, typer.Option(help="both, first or second of a block.")] = "both",
    layers: Layers = "auto",
    pattern: Pattern = "*",
    norms: NormsOf = "all",
    plan: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help='Layer by layer: of allocate, or {"layer or glob": "family"}.'
        ),
    ] = None,
    plan_of: Annotated[
        str | None,
        typer.Option(
            metavar="DOMAIN",
            help="The plan of a domain of this bank; of a compressed one, over the same basis.",
        ),
    ] = None,
    recipe: Recipes = "default",
    epochs: Epochs = None,
    seed: Seed = None,
    size_px: SizePx = None,
    flip: Flip = None,
    squash: Squash = False,
    split: Shares = "0.7,0.15,0.15",
    probe: Annotated[
        bool, typer.Option("--probe/--no-probe", help="Compare with a linear probe.")
    ] = True,
    cache: Annotated[
        int | None,
        typer.Option(
            metavar="VIEWS",
            min=0,
            help="Run what is frozen once for so many augmented views an image (0: none is "
            "augmented), with --stages late --norms placed.",
        ),
    ] = None,
    cache_folder: Annotated[
        Path | None, typer.Option(help="Keep the cached features there, not in memory.")
    ] = None,
    recompute: Annotated[
        bool, typer.Option("--recompute", help="Less memory: compute activations twice.")
    ] = False,
    graphed: Annotated[
        bool, typer.Option("--graphed", help="On CUDA: record a step once and replay it.")
    ] = False,
    resume: Resume = False,
    replace: Replace = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Train a domain and store it in the bank.

    Example: onetrunk train garden.bank flowers --data photos/flowers --adapter "lowrank(rank=8)"
    """
    from ..data import load
    from .training import Request, train_domain

    if cache_folder is not None and cache is None:
        raise typer.BadParameter("it is for --cache VIEWS", param_hint="--cache-folder")
    where = _where(stages, convs, layers, pattern)
    if where is not None and (plan is not None or plan_of is not None):
        raise typer.BadParameter(
            "a plan says which layers: leave --stages, --convs, --layers and --pattern out"
        )
    screen = Screen(as_json)
    opened = _open_for(bank, domain, replace)
    family, basis = _family(opened, adapter, plan, plan_of)
    request = Request(
        domain=domain,
        splits=load(data, split_fractions=_fractions(split)),
        source=data,
        family=family,
        basis=basis,
        where=where,
        norms=norms,  # type: ignore[arg-type]
        recipe=_recipe(recipe, epochs, seed),
        size_px=size_px,
        hflip=flip,
        squash=squash,
        probe=probe,
        cache=cache,
        cache_folder=cache_folder,
        recompute=recompute,
        graphed=graphed,
        resume=resume,
        replace=replace,
        device=_device(device),
    )
    screen.finish({"domain": domain, **train_domain(opened, request, screen).to_json()})


@app.command()
def allocate(
    bank: BankPath,
    domain: Domain,
    data: Source,
    budget: Annotated[
        str,
        typer.Option(help="For the adapters: 2% of the backbone, 150kB, or 40000 numbers."),
    ],
    by: Annotated[
        str,
        typer.Option(help="What is measured: gradient, curvature, or trained (takes a training)."),
    ] = "curvature",
    stages: Stages = "early,mid,late",
    layers: Layers = "all",
    pattern: Pattern = "*",
    norms: NormsOf = "all",
    plan_only: Annotated[bool, typer.Option("--plan-only", help="Train nothing.")] = False,
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the plan, for train --plan.")
    ] = None,
    map_file: Annotated[
        Path | None,
        typer.Option("--map", metavar="FILE", help="Draw layers by domains, of the whole bank."),
    ] = None,
    recipe: Recipes = "default",
    epochs: Epochs = None,
    seed: Seed = None,
    size_px: SizePx = None,
    flip: Flip = None,
    squash: Squash = False,
    split: Shares = "0.7,0.15,0.15",
    resume: Resume = False,
    replace: Replace = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Spend a budget of adapter numbers where a domain needs them, and train it so.

    Example: onetrunk allocate garden.bank flowers --data photos/flowers --budget 2%
    """
    from ..data import load
    from .allocating import Wish, run
    from .training import Request

    if by not in ("gradient", "curvature", "trained"):
        raise typer.BadParameter(
            f"{by!r} is none of gradient, curvature, trained", param_hint="--by"
        )
    screen = Screen(as_json)
    opened = _open_for(bank, domain, replace or plan_only)
    request = Request(
        domain=domain,
        splits=load(data, split_fractions=_fractions(split)),
        source=data,
        where=_where(stages, "both", layers, pattern),
        norms=norms,  # type: ignore[arg-type]
        recipe=_recipe(recipe, epochs, seed),
        size_px=size_px,
        hflip=flip,
        squash=squash,
        resume=resume,
        replace=replace,
        device=_device(device),
    )
    wish = Wish(budget, by, plan_only, out, map_file)  # type: ignore[arg-type]
    screen.finish(run(opened, request, wish, screen))


@app.command()
def evaluate(
    bank: BankPath,
    domain: Domain,
    data: Source,
    split: Annotated[str, typer.Option(help="train, val or test.")] = "test",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Accuracy of a domain on labelled images: overall, balanced, per class, calibration.

    Example: onetrunk evaluate garden.bank flowers --data photos/flowers --split test
    """
    from ..training.evaluate import evaluate as figures_of
    from .training import load_as_trained, split_of

    if split not in ("train", "val", "test"):
        raise typer.BadParameter(f"{split!r} is none of train, val, test", param_hint="--split")
    screen = Screen(as_json)
    opened = _open(bank)
    model = opened.load(domain)
    splits = load_as_trained(data, opened.domains[domain])
    images = split_of(splits, split, data)
    with screen.bar("evaluating") as show:
        result = figures_of(model, images, device=_device(device), progress=show)
    if result.problems:
        screen.warn(f"{len(result.problems)} images left out; the first: {result.problems[0][0]}")
    screen.say(f"{domain}: {result.n_images} {split} images")
    if splits.note:
        screen.say(f"  {splits.note}")
    screen.say(f"  accuracy           {percent(result.accuracy)}")
    screen.say(f"  balanced accuracy  {percent(result.balanced_accuracy)}")
    screen.say(f"  calibration error  {percent(result.calibration_error)}")
    found = result.confusion.sum(axis=1)
    rows = [
        (name, str(found[row]), percent(share))
        for row, (name, share) in enumerate(result.per_class.items())
    ]
    screen.table(("class", "images", "found"), rows)
    screen.finish({"domain": domain, "split": split, **result.to_json()})


@app.command()
def predict(
    bank: BankPath,
    domain: Domain,
    images: Annotated[list[Path], typer.Argument(metavar="IMAGES...", help="Files or folders.")],
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Classes an image.")] = 3,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """The likeliest classes of image files.

    Example: onetrunk predict garden.bank flowers holiday/ --top-k 3
    """
    from ..training.predict import predict as predictions_of

    screen = Screen(as_json)
    model = _open(bank).load(domain)
    asked = images[0] if len(images) == 1 else images
    found = predictions_of(model, asked, top_k=top_k, device=_device(device))
    for prediction in found:
        likely = "  ".join(f"{name} {percent(p)}" for name, p in prediction.classes)
        screen.say(f"{prediction.name}: {likely or prediction.problem}")
    screen.finish(
        [
            {"image": p.name, "classes": [list(c) for c in p.classes], "problem": p.problem}
            for p in found
        ]
    )
    broken = [prediction for prediction in found if prediction.problem]
    if len(broken) == len(found):
        raise BankError(
            f"none of the {len(found)} images can be read; the first: {found[0].problem}"
        )
    if broken:
        first = f"{broken[0].name}: {broken[0].problem}"
        screen.warn(f"{len(broken)} of {len(found)} images could not be read; the first: {first}")


@app.command("list")
def list_domains(bank: BankPath, as_json: AsJson = False) -> None:
    """The domains of a bank; reads its manifest only.

    Example: onetrunk list garden.bank --json
    """
    screen = Screen(as_json)
    opened = _open(bank)
    cards = [opened.domains[name] for name in opened.domains]
    screen.say(f"{bank}: {opened.backbone_form}, {counted(len(cards), 'domain')}")
    rows = [
        (c.name, str(len(c.classes)), c.family, size(c.size), _accuracy(c.metrics)) for c in cards
    ]
    if opened.basis_bytes:
        rows.append(("basis, shared", "", "", size(opened.basis_bytes), ""))
    if rows:
        screen.table(("domain", "classes", "family", "size", "accuracy"), rows)
    screen.finish(
        {
            "bank": str(bank),
            "backbone": opened.backbone_form,
            "fingerprint": opened.backbone_fingerprint,
            "basis_bytes": opened.basis_bytes,
            "domains": {card.name: _card_json(card) for card in cards},
        }
    )


@app.command()
def show(bank: BankPath, domain: Domain, as_json: AsJson = False) -> None:
    """Everything about one domain: classes, family, preprocessing, metrics, what it costs.

    Example: onetrunk show garden.bank flowers
    """
    from ..core.cost import cost
    from ..core.domain import domain_of

    screen = Screen(as_json)
    opened = _open(bank)
    model = opened.load(domain)
    card, record, costs = opened.domains[domain], domain_of(model), cost(model)
    screen.say(f"{domain} in {bank}, on {opened.backbone_form}")
    screen.say(f"  family         {card.family} at {len(record.plan)} sites")
    screen.say(f"  classes        {len(card.classes)}: {', '.join(card.classes)}")
    seen = record.preprocessing
    screen.say(f"  preprocessing  {_pairs(vars(seen)) if seen else 'none: its images are tensors'}")
    screen.say(f"  metrics        {_pairs(card.metrics)}")
    screen.say(f"  provenance     {_pairs(card.provenance)}")
    screen.say(f"  digest         {card.digest}")
    screen.say(str(costs))
    if record.skipped:
        screen.say(f"  {len(record.skipped)} layers without adapter:")
        for name, reason in record.skipped.items():
            screen.say(f"    {name or '(the network itself)'}: {reason}")
    screen.finish(
        {
            **_card_json(card),
            "classes": list(card.classes),
            "plan": {site: str(family) for site, family in record.plan.items()},
            "skipped": dict(record.skipped),
            "preprocessing": record.preprocessing and record.preprocessing.to_json(),
            "cost": costs.to_json(),
        }
    )


@app.command()
def verify(bank: BankPath, as_json: AsJson = False) -> None:
    """Read every byte of a bank: hashes, domains as networks, the backbone's fingerprint.

    Example: onetrunk verify garden.bank
    """
    screen = Screen(as_json)
    found = _open(bank).verify()
    screen.finish(
        {
            "ok": found.ok,
            "domains": found.n_domains,
            "fingerprint": found.fingerprint,
            "problems": list(found.problems),
            "remarks": list(found.remarks),
        }
    )
    for line in (*found.problems, *found.remarks):
        screen.say(f"  {line}")
    if not found.ok:
        raise BankError(
            f"bank {bank} has {len(found.problems)} problem(s); the first: {found.problems[0]}"
        )
    screen.say(
        f"{bank}: {counted(found.n_domains, 'domain')} whole, backbone {found.fingerprint[:12]}"
    )


@app.command()
def remove(
    bank: BankPath,
    domain: Domain,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: AsJson = False,
) -> None:
    """Remove a domain and free its space; the others are not touched.

    Example: onetrunk remove garden.bank flowers --yes
    """
    screen = Screen(as_json)
    opened = _open(bank)
    if domain in opened.domains and not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("removing cannot be undone: say --yes", param_hint="--yes")
        typer.confirm(f"Remove {domain!r} from {bank} for good?", abort=True)
    opened.remove(domain)
    screen.say(f"{bank}: {domain} removed, {counted(len(opened.domains), 'domain')} left")
    screen.finish({"removed": domain, "domains": list(opened.domains)})


@app.command()
def compress(
    bank: BankPath,
    out: Annotated[Path, typer.Option(help="The folder of the new bank.")],
    keep: Annotated[
        float | None,
        typer.Option(
            help="Share of the adapters' numbers to keep, e.g. 0.5; with --uniform of the ranks."
        ),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Instead: of all domains' adapters together, 300kB, 80000 numbers, or 5% of the "
            "backbone."
        ),
    ] = None,
    max_loss: Annotated[
        float | None,
        typer.Option(help="Instead: accuracy a domain may lose on validation images, e.g. 0.01."),
    ] = None,
    share: Annotated[
        str, typer.Option(help="The side that domains share: input, output or both.")
    ] = "input",
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="The same share of ranks wherever that is smaller (the paper)."
        ),
    ] = False,
    tune: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=SOURCE", help="Tune this domain's factors. Again for more."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(metavar="DOMAIN=SOURCE", help="Only measure this domain. Again for more."),
    ] = None,
    tune_basis: Annotated[
        bool,
        typer.Option("--tune-basis", help="First the basis, by all domains; --tune for each."),
    ] = False,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DOMAIN=FOLDER",
            help="Images without labels, to weigh errors by what they activate. Again for more.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of the tuning.")] = 8,
    picture: Annotated[
        bool, typer.Option("--picture/--no-picture", help="Draw accuracy against size.")
    ] = True,
    resume: Resume = False,
    as_json: AsJson = False,
) -> None:
    """Factor all domains' adapters over one shared basis, into a new bank.

    Example: onetrunk compress garden.bank --keep 0.5 --tune flowers=photos/flowers --out half.bank
    """
    from .compressing import Request, read_pairs, run

    tuned, measured = read_pairs(tune or [], "--tune"), read_pairs(data or [], "--data")
    request = Request(
        bank=_open(bank),
        out=out,
        keep=keep,
        budget=budget,
        max_loss=max_loss,
        uniform=uniform,
        share=share,  # type: ignore[arg-type]
        data={**measured, **tuned},
        images=read_pairs(images or [], "--images"),
        tune=frozenset(tuned),
        tune_basis=tune_basis,
        epochs=epochs,
        picture=picture,
        resume=resume,
    )
    run(request, Screen(as_json))


@app.command()
def export(
    bank: BankPath,
    domain: Annotated[
        list[str] | None, typer.Argument(metavar="DOMAIN...", help="One, or several as one ONNX.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The file to write; by default DOMAIN.safetensors.")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every domain of the bank, as ONNX.")
    ] = False,
    file_format: Annotated[
        str | None, typer.Option("--format", help="safetensors, pt2 or onnx; by default OUT's.")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(metavar="SOURCE", help="Images for the check; by default photos."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """The merged network as one file that needs no onetrunk, with class names and preprocessing.

    safetensors: weights, for the stock architecture where they fit it; pt2: torch.export; onnx: for
    ONNX Runtime, OpenVINO and others. The file is read back, run and compared with the domain's
    own network before it appears. Several domains, or --all, become one ONNX file whose second
    input says the domain of each row.

    Example: onetrunk export garden.bank flowers --out flowers.onnx --data photos/flowers
    """
    from . import exporting

    exporting.run(_open(bank), domain or [], every, out, file_format, data, Screen(as_json))


def _open(path: Path) -> "Bank":
    from ..bank.bank import Bank

    return Bank.open(path)


def _open_for(path: Path, domain: str, replace: bool) -> "Bank":
    """The bank, where it can take a domain of that name."""
    from ..bank.names import check_name

    check_name(domain)
    opened = _open(path)
    if domain in opened.domains and not replace:
        raise BankError(
            f"bank {path} has a domain {domain!r} already. Use --replace to train it anew, or "
            "another name."
        )
    return opened


def _family(
    bank: "Bank", adapter: str | None, plan: Path | None, plan_of: str | None
) -> "tuple[Family | Plan | None, Basis | None]":
    """What is attached: a family, the plan of a file or of another domain, or the default."""
    from ..core.adapters import read_family

    if sum(given is not None for given in (adapter, plan, plan_of)) > 1:
        raise typer.BadParameter("--adapter, --plan and --plan-of exclude each other")
    if adapter is not None:
        return read_family(adapter), None
    if plan is None and plan_of is None:
        return None, None
    from . import allocating

    if plan is not None:
        return allocating.read_plan(plan, bank.backbone), None
    return allocating.plan_of(bank, str(plan_of))


def _device(asked: str | None) -> str:
    from ..bank.bank import usable_device
    from ..training.fit import best_device

    return best_device() if asked is None else str(usable_device(asked))


def _recipe(text: str, epochs: int | None, seed: int | None) -> "Recipe":
    """The written recipe, with the two fields that have options of their own."""
    import dataclasses

    from ..training.recipe import read_recipe

    given = {"epochs": epochs, "seed": seed}
    changed = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(read_recipe(text), **changed)  # type: ignore[arg-type]


def _where(stages: str, convs: str, layers: str, pattern: str) -> "Where | None":
    from ..core.plan import Where

    names = tuple(name.strip() for name in stages.split(",") if name.strip())
    where = Where(names, convs, layers, pattern)  # type: ignore[arg-type]
    return None if where == Where() else where


def _fractions(text: str) -> tuple[float, float, float]:
    try:
        train, val, test = (float(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is not three shares such as 0.7,0.15,0.15", param_hint="--split"
        ) from None
    return train, val, test


def _pairs(values: Mapping[str, Any]) -> str:
    known = {name: value for name, value in values.items() if value is not None}
    shown = (f"{value:.4f}" if isinstance(value, float) else value for value in known.values())
    return ", ".join(f"{name} {value}" for name, value in zip(known, shown, strict=True))


def _accuracy(metrics: Any) -> str:
    for name in ("test_accuracy", "val_accuracy"):
        if isinstance(metrics.get(name), float):
            return percent(metrics[name])
    return ""


def _card_json(card: "Card") -> dict[str, Any]:
    return {
        "name": card.name,
        "classes": len(card.classes),
        "family": card.family,
        "numbers": card.numbers,
        "size": card.size,
        "digest": card.digest,
        "metrics": dict(card.metrics),
        "provenance": dict(card.provenance),
    }


def main() -> None:
    """The entry point: errors become one line and an exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # in a terminal's or a file's own encoding
            stream.reconfigure(errors="replace")
    try:
        status = app(standalone_mode=False)
        if status == CTRL_C:
            raise KeyboardInterrupt
        if isinstance(status, int) and status:
            sys.exit(status)
    except OnetrunkError as error:
        _fail(str(error))
    except typer.Abort:
        _fail("nothing was changed.")
    except KeyboardInterrupt:
        verb = sys.argv[1] if sys.argv[1:] else ""
        _fail(STOPPED.get(verb, "stopped; nothing half-written is left."))
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        _fail(
            f"{error.strerror}: what was to be written, or the lines on standard output, found no "
            "room. Make some and run the command again."
        )
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        _fail(
            "torch and torchvision come from different builds. Install both again from one place: "
            "pip install --force-reinstall torch torchvision"
        )
    except Exception as error:
        if hasattr(error, "exit_code") and hasattr(error, "show"):  # a usage error of the parser
            error.show()
            sys.exit(error.exit_code)
        raise


def _fail(message: str) -> None:
    line = "; ".join(part.strip() for part in message.splitlines() if part.strip())
    line = line.replace(":; ", ": ")
    sys.stderr.write(f"error: {line}\n")
    sys.exit(1)
