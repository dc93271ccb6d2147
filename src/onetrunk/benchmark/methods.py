"""The methods that a study compares, by their written form.

    scratch                  the architecture from random weights, everything trained
    head                     the linear probe, to its optimum
    full                     fine-tuning, the reference
    norm, parallel, series, lowrank(rank=8), ...     any adapter family
    parallel@late            the same at some stages; @early+mid, @first, @second likewise
    allocate(budget='1%')    a plan of its own for every domain, by measured sensitivity;
                             also by='gradient' or 'trained', layers='auto', norms='none'
    uniform(budget='1%')     one rank everywhere at that budget
    lora(like='parallel')    PEFT's LoRA on the same layers at about equal numbers, norms saved
    lora(like='parallel', norms=True)                and its norms trained too
    compress(of='parallel', keep=0.5)                joint compression of trained domains, tuned;
                             also share='output' or 'both', weighted=False, and tune='all':
                             the basis too, by all domains, before each tunes its own
    svd(of='parallel', keep=0.5)                     each domain's adapters truncated alone, tuned

To add one: a frozen dataclass here and its line in _BUILDERS.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import nn

from .. import written
from ..backbones.written_form import OWN_MODULE, build_empty, written_form
from ..core.adapters import FAMILIES, Family, Full, Norm, read_family
from ..core.adapters.shared import Share
from ..core.allocate import budget_parts
from ..core.attach import Norms
from ..core.plan import Layers, Where
from ..errors import AttachError, SpecError
from ..training.randomness import own_draws, reseed
from ..training.sensitivity import DEFAULT, By
from .allocated import allocated_plan, uniform_plan
from .lora import peft_lora
from .setting import Setting

Group = Literal["reference", "adapters", "budgeted", "compressed", "rival"]
Tuned = Literal["own", "all"]  # after compression: the domains' own factors, or their basis first
STAGES = ("early", "mid", "late")
CONVS = ("first", "second")


@dataclass(frozen=True)
class Placed:
    """An adapter family, at some or all sites: `parallel`, `lowrank(rank=8)@early+mid`."""

    family: Family
    at: str = ""

    def __str__(self) -> str:
        return f"{self.family}@{self.at}" if self.at else str(self.family)

    @property
    def group(self) -> Group:
        """What its colour says: linear probe and fine-tuning are what adapters are held against."""
        return "adapters" if self.family.scope == "adapters" else "reference"

    def make(self, setting: Setting) -> nn.Module:
        return setting.attach(self.family, self._where())

    def _where(self) -> Where | None:
        if not self.at:
            return None
        if self.at in CONVS:
            return Where(convs=self.at)  # type: ignore[arg-type]
        return Where(stages=tuple(self.at.split("+")))


@dataclass(frozen=True)
class Scratch:
    """The architecture from random weights of the cell's seed, everything trained."""

    group: ClassVar[Group] = "reference"
    lr_full: ClassVar[float] = 5e-3  # as adapters have it: nothing pretrained is to be kept

    def __str__(self) -> str:
        return "scratch"

    def make(self, setting: Setting) -> nn.Module:
        form = written_form(setting.backbone)
        with own_draws():
            reseed(setting.seed)
            fresh = build_empty(form) if not form.startswith(OWN_MODULE) else None
        if fresh is None:
            raise AttachError(
                f"scratch on {form}: a module of your own has no form to build it anew from. "
                "Leave scratch out."
            )
        fresh.to(memory_format=torch.channels_last)
        return dataclasses.replace(setting, backbone=fresh).attach(Full())


@dataclass(frozen=True)
class Allocate:
    """A plan of the domain's own: ranks where a measured sensitivity says they buy the most."""

    budget: str = "1%"
    by: By = DEFAULT
    layers: Layers = "all"
    norms: Norms = "all"
    group: ClassVar[Group] = "budgeted"

    def __str__(self) -> str:
        options = _changed(self, "by", "layers", "norms")
        return written.write("allocate", {"budget": self.budget, **options})

    def make(self, setting: Setting) -> nn.Module:
        plan = allocated_plan(setting, self.budget, self.by, self.layers)
        return setting.attach(plan, norms=self.norms)


@dataclass(frozen=True)
class Uniform:
    """One rank everywhere, the largest that a budget allows: the yardstick of `allocate`."""

    budget: str = "1%"
    group: ClassVar[Group] = "budgeted"

    def __str__(self) -> str:
        return written.write("uniform", {"budget": self.budget})

    def make(self, setting: Setting) -> nn.Module:
        return setting.attach(uniform_plan(setting, self.budget))


@dataclass(frozen=True)
class Lora:
    """PEFT's LoRA on the layers that `like` adapts, at about as many numbers."""

    like: str
    norms: bool = False
    group: ClassVar[Group] = "rival"

    def __str__(self) -> str:
        return written.write("lora", {"like": self.like, **_changed(self, "norms")})

    def make(self, setting: Setting) -> nn.Module:
        twin = read_method(self.like)
        assert isinstance(twin, Placed)
        return peft_lora(setting, twin.make(setting), train_norms=self.norms)


@dataclass(frozen=True)
class Compressed:
    """Joint compression of the trained domains of method `of`, or each alone (`svd`); tuned."""

    of: str
    keep: float
    share: Share = "input"
    weighted: bool = True
    tune: Tuned = "own"
    alone: bool = False
    group: ClassVar[Group] = "compressed"

    def __str__(self) -> str:
        name = "svd" if self.alone else "compress"
        options = _changed(self, "share", "weighted", "tune")
        return written.write(name, {"of": self.of, "keep": self.keep, **options})


Method = Placed | Scratch | Allocate | Uniform | Lora | Compressed
Trained = Placed | Scratch | Allocate | Uniform | Lora


def _changed(value: Any, *names: str) -> dict[str, Any]:
    changed = written.changed_fields(value)
    return {name: changed[name] for name in names if name in changed}


_BUILDERS: dict[str, Callable[..., Method]] = {
    "scratch": Scratch,
    "allocate": Allocate,
    "uniform": Uniform,
    "lora": Lora,
    "compress": Compressed,
    "svd": lambda **fields: Compressed(alone=True, **fields),
}


def read_method(text: str) -> Method:
    """The method that `text` writes.

    >>> str(read_method("lowrank(rank=8)@early+mid"))
    'lowrank(rank=8)@early+mid'

    Raises:
        SpecError: where the form, the name, a field or a place is unknown.
        AttachError: where a family's option is out of range.
    """
    form, at_sign, at = text.strip().rpartition("@")
    if not at_sign or ")" in at:
        form, at = text.strip(), ""
    name, fields = written.read(form, "method")
    if name in FAMILIES:
        places = at.split("+") if at else []
        if at not in CONVS and any(place not in STAGES for place in places):
            raise SpecError(
                f"method {text!r}: {at!r} is no place. Use stages with + between "
                f"({', '.join(STAGES)}), first or second."
            )
        family = read_family(form)
        if at and (family.scope == "head" or isinstance(family, Norm)):
            raise SpecError(f"method {text!r}: {name} is placed at no layer. Leave @{at} out.")
        return Placed(family, at)
    if name not in _BUILDERS:
        raise written.unknown("method", name, (*_BUILDERS, *FAMILIES))
    if at:
        raise SpecError(f"method {text!r}: only a family is placed with @.")
    try:
        method = _BUILDERS[name](**fields)
    except TypeError as error:
        reason = str(error).split(") ")[-1]
        raise SpecError(f"method {text!r}: {reason}.") from None
    _check(method, text)
    return _in_one_form(method)


def _in_one_form(method: Method) -> Method:
    """`of` and `like` as their methods write themselves, so that equal methods are equal."""
    if isinstance(method, Lora):
        return dataclasses.replace(method, like=str(read_method(method.like)))
    if isinstance(method, Compressed):
        return dataclasses.replace(method, of=str(read_method(method.of)))
    return method


def adapts(form: object, kinds: Any = Placed | Allocate | Uniform) -> bool:
    """Whether `form` writes a method of these kinds that puts adapters at layers."""
    found = read_method(form) if isinstance(form, str) else None
    if isinstance(found, Placed):
        return found.family.scope == "adapters" and not isinstance(found.family, Norm)
    return isinstance(found, kinds)


def _check(method: Method, text: str) -> None:
    if isinstance(method, Lora):
        if not adapts(method.like, Placed):
            raise SpecError(f"method {text!r}: `like` names an adapter family, e.g. 'parallel'.")
        if not isinstance(method.norms, bool):
            raise SpecError(f"method {text!r}: `norms` is True or False.")
    if isinstance(method, Compressed):
        if not isinstance(method.weighted, bool):
            raise SpecError(f"method {text!r}: `weighted` is True or False.")
        if not adapts(method.of):
            raise SpecError(f"method {text!r}: `of` names a method with adapters.")
        if not isinstance(method.keep, int | float) or not 0 < method.keep <= 1:
            raise SpecError(f"method {text!r}: keep is a share above 0, at most 1.")
        if method.share not in get_args(Share):
            raise SpecError(f"method {text!r}: `share` is one of {', '.join(get_args(Share))}.")
        if method.tune not in get_args(Tuned):
            raise SpecError(f"method {text!r}: `tune` is one of {', '.join(get_args(Tuned))}.")
    if isinstance(method, Allocate | Uniform):
        try:
            budget_parts(method.budget)
        except SpecError as error:
            raise SpecError(f"method {text!r}: {error}") from None
    if isinstance(method, Allocate):
        if method.by not in get_args(By):
            raise SpecError(f"method {text!r}: `by` is one of {', '.join(get_args(By))}.")
        if method.norms not in get_args(Norms):
            raise SpecError(f"method {text!r}: `norms` is one of {', '.join(get_args(Norms))}.")
        Where(layers=method.layers)  # refuses what is none
