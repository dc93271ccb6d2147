"""pretrain: a backbone's own weights from a data source, into one safetensors file."""

import platform
import shlex
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..backbones import backbone as build_backbone
from ..bank.lock import one_at_a_time
from ..core.adapters import Family
from ..core.domain import domain_of
from ..data import Prepared, Preprocessing, load
from ..errors import TrainingError
from ..files import check_place, reason
from ..training.checkpoint import forgotten_if_diverged
from ..training.distributed import World, join
from ..training.evaluate import evaluate
from ..training.fit import fit
from ..training.pretrain import pretraining, write_trunk
from ..training.recipe import Recipe
from ..training.size import sensible_size
from .console import Screen, counted, followed, percent, size
from .reading import name_of, read, say_how_it_was_read


@dataclass(frozen=True)
class Request:
    """What to pretrain, as the user asked for it."""

    backbone: str
    data: str
    out: Path
    recipe: Recipe
    adapter: Family | None = None
    weights: Path | None = None
    size_px: int | None = None
    flip: bool | None = None
    half: bool = False
    merge: bool = False
    resume: bool = False
    device: str | None = None


def pretrain(request: Request, screen: Screen) -> None:
    """Trains, evaluates on validation and test images, writes the file; a killed run goes on.

    Of several processes the first one talks and writes.

    Raises:
        OnetrunkError: of the room that refuses; `out` is then as it was.
    """
    checkpoint = request.out.parent / f"{request.out.name}.unfinished"
    with join(request.device) as world:
        if not world.leads:
            _pretrain(request, checkpoint, Screen(quiet=True), world)
            return
        _check_place(request)
        with _alone(request):
            _make_way(request, checkpoint, screen)
            _pretrain(request, checkpoint, screen, world)


def _alone(request: Request) -> AbstractContextManager[None]:
    """For one pretraining of a file at a time."""
    out = request.out
    busy = TrainingError(
        f"{out} is being pretrained by another process. Wait for it, or give another --out."
    )
    lock = out.with_name(f"{out.name}.unfinished.lock")
    return one_at_a_time(lock, busy, TrainingError, f"cannot write {out}")


def _check_place(request: Request) -> None:
    if request.merge and request.adapter is None:
        raise TrainingError("--merge folds adapters in, and there are none: give --adapter too.")
    try:
        check_place(request.out)
    except OSError as error:
        raise TrainingError(f"cannot write {request.out}: {reason(error)}") from error


def _make_way(request: Request, checkpoint: Path, screen: Screen) -> None:
    if request.out.exists():
        raise TrainingError(f"{request.out} is there already. Give another file, or remove it.")
    if checkpoint.exists() and not request.resume:
        raise TrainingError(
            f"{checkpoint} is a pretraining that was stopped. Go on with --resume, or remove it."
        )
    if request.resume and not checkpoint.exists():
        screen.say("nothing to resume: starting from the beginning")


def _pretrain(request: Request, checkpoint: Path, screen: Screen, world: World) -> None:
    started = time.monotonic()
    splits = load(request.data).with_validation()
    fresh = build_backbone(request.backbone, pretrained=False, weights=request.weights)
    fresh.to(memory_format=torch.channels_last)
    hflip = splits.hflip if request.flip is None else request.flip
    px = request.size_px or sensible_size(fresh, splits.train)
    preprocessing = Preprocessing.for_backbone(fresh, px, True if hflip is None else hflip)
    data = {}
    for name in ("train", "val", "test"):
        if (images := getattr(splits, name)) is not None:
            data[name] = read(images, preprocessing, name, screen)
    say_how_it_was_read(splits, screen)
    model = pretraining(
        fresh, splits.classes, request.adapter, preprocessing=preprocessing,
        seed=request.recipe.seed,
    )  # fmt: skip
    screen.say(
        f"{request.backbone}, {domain_of(model).family}: {len(splits.classes)} classes, "
        f"{len(data['train'])} images of {preprocessing.size_px} px, "
        f"{counted(request.recipe.n_epochs(len(data['train'])), 'epoch')}, "
        f"{counted(world.size, 'process')}"
    )
    _train(model, data, request, checkpoint, screen)
    accuracies = {
        f"{name}_accuracy": evaluate(model, data[name]).accuracy for name in data if name != "train"
    }
    card = {
        **accuracies,
        "data": name_of(request.data),
        "classes": list(splits.classes),
        "train_images": len(data["train"]),
        "preprocessing": preprocessing.to_json(),
        "recipe": str(request.recipe),
        "trained_with": domain_of(model).family,
        "adapters": "none" if request.adapter is None else _kept(request.merge),
        "started_from": None if request.weights is None else request.weights.name,
        "seconds": round(time.monotonic() - started),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread(s), {world.size} "
        f"process(es), torch {torch.__version__}",
    }
    if not world.leads:
        return
    n_bytes = write_trunk(request.out, model, card, half=request.half, merged=request.merge)
    checkpoint.unlink(missing_ok=True)
    for name, accuracy in accuracies.items():
        screen.say(f"  {name.replace('_', ' ')} {percent(accuracy)}")
    screen.say(f"{request.out}: {size(n_bytes)}, {card['seconds']} s")
    out = shlex.quote(str(request.out))
    screen.say(f'use it: onetrunk new BANK --backbone "{request.backbone}" --weights {out}')
    epochs = request.recipe.n_epochs(len(data["train"]))
    screen.finish({**card, "out": str(request.out), "epochs": epochs, "bytes": n_bytes})


def _kept(merged: bool) -> str:
    return "folded in" if merged else "left out: the accuracies are with them"


def _train(
    model: nn.Module,
    data: dict[str, Prepared],
    request: Request,
    checkpoint: Path,
    screen: Screen,
) -> None:
    with screen.bar("pretraining") as show, forgotten_if_diverged(checkpoint):
        steps = fit(
            model,
            data["train"],
            request.recipe,
            val=data["val"],
            checkpoint=checkpoint,
            device=request.device,
        )
        for step in followed(steps, show):
            if step.val_accuracy is not None and not screen.err.is_terminal:
                screen.say(
                    f"  epoch {step.epoch}: loss {step.loss:.3f}, "
                    f"validation {percent(step.val_accuracy)}"
                )
