"""The three studies over a folder of domains, as values: what each compares by default.

mini      methods x domains: accuracy against parameters, the paper's central picture
transfer  methods x training images a class: who wins with how little data
stages    one family at early, mid, late stages, first or second convolutions: where change pays
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import written
from ..core.plan import default_family
from ..core.trace import trace
from ..errors import DataError, TrainingError
from .cells import Trunk, backbone_of
from .methods import Compressed, Lora, read_method
from .protocol import FULL, SMALL, Protocol
from .report import MethodLabel
from .study import Study, domains_in

BASE = "tiny_imagenet"  # what the packaged ResNet-26 was pretrained on: no domain of a study
ALL = 0  # as a number of images a class: every image
PER_CLASS = (5, 10, 25, 50, 100, ALL)
TRUNKS = ("resnet26(width=0.5)", "timm:tf_efficientnet_lite0")  # those that come with weights
PLACES = ("early", "mid", "late", "early+mid", "mid+late", "first", "second")


@dataclasses.dataclass(frozen=True)
class Wish:
    """What of a study is asked for; empty fields have the study's defaults."""

    data: Path
    out: Path
    backbones: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    domains: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    per_class: tuple[int, ...] = PER_CLASS
    full: bool = False
    graphed: bool = False


def mini(wish: Wish) -> list[Study]:
    """Methods x domains x seeds, a study for each backbone."""
    return [
        _study("mini", wish, trunk, wish.methods or default_methods(trunk, wish.full))
        for trunk in _trunks(wish)
    ]


def stages(wish: Wish) -> list[Study]:
    """The default family at some stages or positions, all of them, and its yardsticks."""
    studies = []
    for trunk in _trunks(wish):
        family = default_adapter(trunk)
        placed = tuple(f"{family}@{place}" for place in PLACES)
        methods = wish.methods or ("norm", *placed, family)
        studies.append(_study("stages", wish, trunk, methods))
    return studies


def transfer(wish: Wish) -> list[Study]:
    """Methods x training images a class x seeds.

    Raises:
        TrainingError: where a number of images a class is below 2.
    """
    if wrong := [n for n in wish.per_class if n < 2 and n != ALL]:
        raise TrainingError(
            f"transfer with {wrong[0]} images a class: training and validation need 2 at least."
        )
    studies = []
    for trunk in _trunks(wish):
        family = default_adapter(trunk)
        methods = wish.methods or ("head", "norm", "full", "series", family)
        for n in wish.per_class:
            protocol = dataclasses.replace(_protocol(trunk, wish.full), keep="late", **_images(n))
            studies.append(_study("transfer", wish, trunk, methods, protocol))
    return studies


def _images(n: int) -> dict[str, Any]:
    """The fields of a protocol that say how many training images there are."""
    return {"images": 10**9, "val_images": 10**9} if n == ALL else {"per_class": n}


STUDIES = {"mini": mini, "transfer": transfer, "stages": stages}


def default_methods(trunk: Trunk, full: bool) -> tuple[str, ...]:
    """What `mini` compares on a backbone without a choice of the user's."""
    family = default_adapter(trunk)
    methods = (
        "head", "full", family, "norm", "series", "allocate(budget='8%')", "allocate(budget='1%')",
        "uniform(budget='1%')", _written("lora", like=family, norms=True),
        _written("compress", of=family, keep=0.5),
        _written("compress", of=family, keep=0.25, tune="all"),
        _written("svd", of=family, keep=0.25, tune="all"),
    )  # fmt: skip
    if not full:
        return methods
    more = ("scratch", "channelwise", "lowrank(rank=4)", _written("lora", like=family))
    return (*methods, *more, "allocate(budget='0.5%')", "allocate(budget='2%')")


def default_adapter(trunk: Trunk) -> str:
    """The family that `attach` would choose on a backbone, as a method."""
    return str(default_family(trace(backbone_of(trunk))))


def shown(methods: Sequence[str]) -> list[MethodLabel]:
    """The methods as a report shows them: their written form and the group of their colour.

    >>> [method.label for method in shown(["full", "svd(of='series', keep=0.5)"])]
    ['fine-tuning', 'compressed alone, keep 0.5']
    """
    short = {method: _label(method) for method in methods}
    often = {label for label in short.values() if list(short.values()).count(label) > 1}
    return [
        MethodLabel(
            method,
            f"{label} ({_apart(method)})" if label in often else label,
            read_method(method).group,
        )
        for method, label in short.items()
    ]


LABELS = {
    "head": "linear probe",
    "norm": "norms only",
    "full": "fine-tuning",
    "scratch": "from scratch",
}


def _label(method: str) -> str:
    if method.startswith("lora("):
        return "PEFT LoRA + norms" if "norms=True" in method else "PEFT LoRA"
    read = read_method(method)
    if isinstance(read, Compressed):
        kind = "alone" if read.alone else "joint"
        side = "" if read.share == Compressed.share else f" by {read.share}"
        tuned = "" if read.tune == Compressed.tune else ", basis tuned"
        return f"compressed {kind}{side}, keep {read.keep:g}{tuned}"
    return LABELS.get(method, method)


def _apart(method: str) -> str:
    """What tells a method from others with its label."""
    read = read_method(method)
    if isinstance(read, Compressed):
        return read.of if read.weighted else f"{read.of}, unweighted"
    return read.like if isinstance(read, Lora) else method


def _written(name: str, **fields: object) -> str:
    return written.write(name, fields)


def _study(
    name: str, wish: Wish, trunk: Trunk, methods: Sequence[str], protocol: Protocol | None = None
) -> Study:
    found = tuple(dict.fromkeys(domains_in(wish.data, wish.domains, out=wish.out)))
    domains = found if wish.domains else tuple(domain for domain in found if domain != BASE)
    if not domains:
        raise DataError(
            f"{wish.data} has no domain but {BASE}, on which the packaged ResNet-26 was "
            f"pretrained. Add others, or name it: --domains {BASE}."
        )
    return Study(
        name=name,
        data=wish.data,
        trunks=((trunk, protocol or _protocol(trunk, wish.full)),),
        domains=domains,
        methods=tuple(dict.fromkeys(str(read_method(method)) for method in methods)),
        seeds=tuple(dict.fromkeys(wish.seeds)),
        work=wish.out,
        graphed=wish.graphed,
    )


def _trunks(wish: Wish) -> list[Trunk]:
    """The backbones; a report tells them apart by their names, which are files' without folders."""
    trunks = list(dict.fromkeys(Trunk.read(text) for text in wish.backbones or TRUNKS))
    for trunk in trunks:
        if same := [other for other in trunks if other != trunk and str(other) == str(trunk)]:
            raise TrainingError(
                f"{trunk.weights} and {same[0].weights} would both be {trunk} in the report: "
                "give one of the files another name, or one study each."
            )
    return trunks


def _protocol(trunk: Trunk, full: bool) -> Protocol:
    if full:
        return FULL
    if trunk.form.startswith("resnet26"):
        return dataclasses.replace(
            SMALL, size_px=32
        )  # its feature maps are 4 times larger than EfficientNet's
    return SMALL
