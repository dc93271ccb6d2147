"""One execution of a backbone, observed: its layers in order, their sizes, what follows what.

The execution runs on PyTorch's meta device, where shapes are computed and numbers are not, so it
costs milliseconds and no memory; a backbone that cannot run there runs on zeros instead.
"""

import contextlib
import copy
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ..errors import BackboneError
from .sites import STAGES, Site, package_and_class, site_of
from .tree import copy_tree, is_norm, own_tensors

Size = tuple[int, int, int]  # channels, rows, columns


@dataclass(frozen=True)
class Trace:
    """What one execution showed.

    Args:
        sites: every adaptable layer but the head, in order of execution.
        skipped: layer with weights -> why it is no site.
        head: the classifier's modules; empty where none was found.
        head_features: features that go into it; 0 where unknown.
        input_size: channels, rows, columns of the executed image.
        executed: layers and norms in order of their calls; one that is called twice is there twice.
    """

    sites: tuple[Site, ...]
    skipped: Mapping[str, str]
    head: tuple[str, ...]
    head_features: int
    input_size: Size
    executed: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Call:
    name: str
    x_shape: torch.Size
    y_shape: torch.Size


def trace(backbone: nn.Module, input_size: Size | None = None, head: str | None = None) -> Trace:
    """Observes one image going through `backbone`, which is left as it was.

    Args:
        input_size: channels, rows, columns; by default what the backbone says of itself
            (`pretrained_cfg`), else the first of 224, 64, 32 and 28 pixels that runs.
        head: the classifier's module path, where it is not found by itself.

    Raises:
        BackboneError: where no size runs, or `head` names no module.
    """
    if head is not None and head not in dict(backbone.named_modules()):
        raise BackboneError(
            f"head {head!r}: {type(backbone).__name__} has no such module. "
            f"Its last modules are {', '.join(list(dict(backbone.named_modules()))[-4:])}."
        )
    seen, y_shape, size = _first_that_runs(backbone, input_size)
    calls = [call for call in seen if _is_leaf(backbone.get_submodule(call.name))]
    heads = (head,) if head else find_head(backbone, calls, y_shape)
    by_name: dict[str, list[_Call]] = {}
    for call in calls:
        by_name.setdefault(call.name, []).append(call)
    features = _features(by_name, heads, y_shape)
    executed = tuple(call.name for call in seen)
    return Trace(*_sites_and_skipped(backbone, by_name, heads), heads, features, size, executed)


def _is_leaf(module: nn.Module) -> bool:
    return next(module.children(), None) is None


def default_sizes(backbone: nn.Module) -> list[Size]:
    """The image sizes to try, best first."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    if config.get("input_size"):
        return [tuple(config["input_size"])]
    convs = (m for m in backbone.modules() if isinstance(m, nn.Conv2d))
    first = next(convs, None)
    channels = first.in_channels if first is not None else 3
    known = getattr(backbone, "image_size", None)  # torchvision's ViT
    sizes = [known] if isinstance(known, int) else [224, 64, 32, 28]
    # the convolution registered first need not be the one that sees the image
    return [(n, side, side) for n in dict.fromkeys((channels, 3)) for side in sizes]


def _first_that_runs(
    backbone: nn.Module, input_size: Size | None
) -> tuple[list[_Call], torch.Size, Size]:
    def observe(device: str, size: Size) -> tuple[list[_Call], torch.Size, Size]:
        return *_run(backbone, size, device), size

    try:
        return _first_run(backbone, ("meta", "cpu"), [input_size], observe)
    except _NothingRunsError as error:
        _refuse_no_copy(backbone)
        tried = ", ".join("x".join(map(str, size)) for size in _to_try(backbone, [input_size]))
        raise BackboneError(
            f"{type(backbone).__name__} does not run on one image of {tried} ({error}). "
            "Say the size it takes: input_size=(channels, rows, columns)."
        ) from error


def _refuse_no_copy(backbone: nn.Module) -> None:
    try:
        copy_tree(backbone)
    except Exception as error:  # whatever a user's module raises is only reported
        raise BackboneError(
            f"{type(backbone).__name__} cannot be copied ({type(error).__name__}: {error}): "
            "its domains are copies over the same weights. Where torch.nn.utils.weight_norm or "
            "spectral_norm is the cause, take those of torch.nn.utils.parametrizations."
        ) from error


def on_device(backbone: nn.Module, device: str) -> nn.Module:
    """A copy of `backbone` in eval mode: shapes only on `meta`, elsewhere its own parameters.

    Buffers are really copied, as a forward may write to them.
    """
    if device != "meta":
        return copy_tree(backbone, own=backbone.buffers()).to(device).eval()
    memo: dict[int, object] = {}
    for parameter in backbone.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in backbone.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(backbone, memo).eval()


def example(backbone: nn.Module, size: Size, device: str, n_images: int = 1) -> Tensor:
    """Images of zeros in the backbone's dtype."""
    floating = (p.dtype for p in backbone.parameters() if p.is_floating_point())
    return torch.zeros((n_images, *size), dtype=next(floating, torch.float32), device=device)


@torch.no_grad()
def _run(backbone: nn.Module, size: Size, device: str) -> tuple[list[_Call], torch.Size]:
    copied, calls = on_device(backbone, device), list[_Call]()

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, args: Any, y: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(y, Tensor):
                calls.append(_Call(name, args[0].shape, y.shape))

        return hook

    for name, module in copied.named_modules():
        if _is_leaf(module) or is_norm(module):  # timm's norms hold their activation
            module.register_forward_hook(note(name))
    with _NormsLeftOut() if device == "meta" else contextlib.nullcontext():
        y = copied(example(backbone, size, device))
    return calls, _last_shape(y)


class _NormsLeftOut(TorchFunctionMode):
    """While it is entered, norms give back their input: they cost time and change no shape."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _NORM_FUNCTIONS and args:
            return args[0]
        return func(*args, **(kwargs or {}))


_NORM_FUNCTIONS = {F.batch_norm, F.layer_norm, F.group_norm, F.instance_norm}


def _last_shape(y: Any) -> torch.Size:
    if isinstance(y, Tensor):
        return y.shape
    if isinstance(y, (tuple, list)) and y and isinstance(y[0], Tensor):
        return y[0].shape
    return torch.Size()


def find_head(backbone: nn.Module, calls: list[_Call], y_shape: torch.Size) -> tuple[str, ...]:
    """The classifier: what timm names, else the last layer where its output is the network's.

    That is a linear layer, a 1x1 convolution with a bias (alone, or with nothing but pooling and
    activations behind it, as in SqueezeNet), or an `nn.Identity` at the very end.
    """
    names = timm_classifier(backbone)
    if names:
        return names
    if len(y_shape) < 2:
        return ()
    modules = dict(backbone.named_modules())
    for call in reversed(calls):
        module = modules[call.name]
        if isinstance(module, nn.Identity) and call is calls[-1] and len(y_shape) == 2:
            return (call.name,)
        if isinstance(module, nn.Linear):
            return (call.name,) if call.y_shape == y_shape else ()
        if isinstance(module, nn.Conv2d):
            scores = module.kernel_size == (1, 1) and module.bias is not None
            return (call.name,) if scores and call.y_shape[1] == y_shape[1] else ()
        if next(own_tensors(module), None) is not None:
            return ()
    return ()


def timm_classifier(backbone: nn.Module) -> tuple[str, ...]:
    """The classifier's module paths as timm's configuration names them, where they exist."""
    config = getattr(backbone, "pretrained_cfg", None) or {}
    names = config.get("classifier") or ()
    names = (names,) if isinstance(names, str) else tuple(names)
    modules = dict(backbone.named_modules())
    return tuple(name for name in names if name in modules)


def _features(
    by_name: Mapping[str, list[_Call]], heads: tuple[str, ...], y_shape: torch.Size
) -> int:
    inside = (calls[0] for name, calls in by_name.items() if _within(name, heads[:1]))
    call = next(inside, None)
    if call is None:
        return y_shape[-1] if len(y_shape) == 2 else 0
    return call.x_shape[1] if len(call.x_shape) in (2, 4) else call.x_shape[-1]


def _sites_and_skipped(
    backbone: nn.Module, by_name: Mapping[str, list[_Call]], heads: tuple[str, ...]
) -> tuple[tuple[Site, ...], Mapping[str, str]]:
    found: list[tuple[Site, list[_Call]]] = []
    skipped: dict[str, str] = {}
    for name, module in backbone.named_modules():
        if _within(name, heads):
            continue
        site = site_of(name, module)
        if isinstance(site, Site) and name not in by_name:
            skipped[name] = "it is not called as a module in a forward pass"
        elif isinstance(site, Site):
            found.append((site, by_name[name]))
        elif isinstance(site, str):
            skipped[name] = site
        elif not is_norm(module):
            skipped |= _lone_parameters(name, module)
    order = {name: place for place, name in enumerate(by_name)}
    found.sort(key=lambda pair: order[pair[0].name])
    return _with_stages([_sized(site, met, k) for k, (site, met) in enumerate(found)]), skipped


def _lone_parameters(name: str, module: nn.Module) -> dict[str, str]:
    """The module that holds parameters of its own; the parameters' names where it is the root."""
    held = [key for key, parameter in module._parameters.items() if parameter is not None]
    if not name:
        return {key: f"a parameter of {type(module).__name__} itself" for key in held}
    what = f"{type(module).__name__} with {', '.join(held)} is neither Conv2d nor Linear"
    return {name: what} if held else {}


def _within(name: str, heads: tuple[str, ...]) -> bool:
    return any(name == head or name.startswith(head + ".") for head in heads)


def _sized(site: Site, calls: list[_Call], order: int) -> Site:
    positions = [call.y_shape.numel() // site.cout for call in calls]
    rows, columns = calls[0].y_shape[-2:] if site.kind == "conv" else (positions[0], 1)
    return dataclasses.replace(site, order=order, out_hw=(rows, columns), positions=sum(positions))


def _with_stages(sites: list[Site]) -> tuple[Site, ...]:
    """Early, mid, late: thirds of the resolutions met, or of the depth where there are under three.

    Resolution only falls along the execution; layers on pooled vectors (squeeze-and-excite)
    belong to the resolution around them.
    """
    levels, finest = list[int](), 0
    for site in sites:
        if not finest or 1 < site.positions < finest:
            finest = site.positions
        levels.append(finest)
    met = sorted(set(levels), reverse=True)
    if len(met) < len(STAGES):
        levels, met = list(range(len(sites))), list(range(len(sites)))
    return tuple(
        dataclasses.replace(site, stage=STAGES[len(STAGES) * met.index(level) // len(met)])
        for site, level in zip(sites, levels, strict=True)
    )


class _Consumers(TorchFunctionMode):
    """Which function calls read which tensors, while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.readers: dict[int, list[str]] = {}
        self.alive: list[Tensor] = []  # keeps ids from being used again

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm and args and args[0].is_meta:
            result = torch.empty_like(args[0])  # the slowest call there is on meta
        else:
            result = func(*args, **(kwargs or {}))
        size = isinstance(result, torch.Size)  # a tuple too, and no reading of numbers
        if isinstance(result, (Tensor, tuple, list)) and not size:
            for value in _tensors([*args, *(kwargs or {}).values()]):
                self.alive.append(value)
                self.readers.setdefault(id(value), []).append(getattr(func, "__name__", "?"))
        return result


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (tuple, list)):
            yield from _tensors(value)
        elif isinstance(value, dict):
            yield from _tensors(value.values())


@torch.no_grad()
def following_norms(
    network: nn.Module, layers: set[str], size: Size | None = None
) -> dict[str, str]:
    """Layer -> the batch norm that alone reads its output, for layers and norms called once.

    Only norms whose forward is known count, and only where their channels are the layer's: behind a
    linear layer on (b, n, f) a batch norm is over n.

    Args:
        network: run once in eval mode, on a copy.
        layers: the module paths of convolutions and linear layers whose outputs are followed.
        size: channels, rows, columns that it runs at; by default what it says of itself.
    """
    if not layers or not any(folds_into_a_layer(module) for module in network.modules()):
        return {}
    follow = functools.partial(_follow, network, layers)
    devices = "meta", _own_device(network)
    with contextlib.suppress(_NothingRunsError):
        return _first_run(network, devices, (size,), follow)
    return {}  # where nothing runs, nothing folds


_Found = TypeVar("_Found")


class _NothingRunsError(Exception):
    """A network that runs on none of the devices and sizes that were tried."""


def _own_device(network: nn.Module) -> str:
    return str(next(parameter.device for parameter in network.parameters()))


def _first_run(
    network: nn.Module,
    devices: Iterable[str],
    sizes: Iterable[Size | None],
    observe: Callable[[str, Size], _Found],
) -> _Found:
    """What is observed on the first device and size that run.

    Raises:
        _NothingRunsError: where there is none, with what the last one complained of.
    """
    problem = ""
    for device in devices:
        for tried in _to_try(network, sizes):
            try:
                return observe(device, tried)
            except Exception as error:  # whatever a user's forward raises is only reported
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
    raise _NothingRunsError(problem)


def _to_try(network: nn.Module, sizes: Iterable[Size | None]) -> list[Size]:
    """The sizes that are known, else what the network says of itself."""
    return list(dict.fromkeys(size for size in sizes if size)) or default_sizes(network)


def _follow(network: nn.Module, layers: set[str], device: str, size: Size) -> dict[str, str]:
    copied = on_device(network, device)
    made: dict[str, list[Tensor]] = {}
    read: dict[str, list[int]] = {}

    def note_output(name: str) -> Callable[..., None]:
        return lambda _module, _args, y: made.setdefault(name, []).append(y)

    def note_input(name: str) -> Callable[..., None]:
        return lambda _module, args: read.setdefault(name, []).append(id(args[0]))

    for name, module in copied.named_modules():
        if name in layers:
            module.register_forward_hook(note_output(name))
        elif folds_into_a_layer(module):
            module.register_forward_pre_hook(note_input(name))
    with _Consumers() as consumers:
        returned = copied(example(network, size, device))
    norm_of = {ids[0]: name for name, ids in read.items() if len(ids) == 1}
    seen_outside = {id(tensor) for tensor in _tensors([returned])}
    return {
        name: norm_of[id(outputs[0])]
        for name, outputs in made.items()
        if len(outputs) == 1
        and id(outputs[0]) in norm_of
        and id(outputs[0]) not in seen_outside
        and consumers.readers.get(id(outputs[0])) == ["batch_norm"]
        and outputs[0].ndim == (4 if isinstance(copied.get_submodule(name), nn.Conv2d) else 2)
    }


def folds_into_a_layer(norm: nn.Module) -> TypeGuard[nn.modules.batchnorm._BatchNorm]:
    """A batch norm with statistics and a known forward: torch's, or timm's with its activation."""
    if not isinstance(norm, nn.modules.batchnorm._BatchNorm) or norm.running_mean is None:
        return False
    cls: Any = type(norm)
    known = (nn.modules.batchnorm._BatchNorm.forward, nn.SyncBatchNorm.forward)
    with_activation = {("timm", "BatchNormAct2d"), ("timm", "SyncBatchNormAct")}
    return cls.forward in known or package_and_class(norm) in with_activation


def rows_per_image(
    network: nn.Module, layers: set[str], sizes: Iterable[Size | None]
) -> dict[str, int]:
    """Layer -> the rows that it gets for each image of a batch: 1, or more for windows of images.

    0 where their number does not follow the batch. Layers that are not called are left out.

    Args:
        network: as for `following_norms`.
        layers: module paths.
        sizes: channels, rows, columns, of which the first that runs is taken; by default what the
            network says of itself.

    Raises:
        BackboneError: where the network does not run.
    """

    def counted(device: str, tried: Size) -> dict[str, int]:
        two, three = (_n_rows(network, layers, tried, device, n) for n in (2, 3))
        return {
            name: two[name].pop() // 2 if _follows(two[name], three.get(name, set())) else 0
            for name in two
        }

    devices = "meta", _own_device(network)
    return _known_rows(network, devices, sizes, counted)


def _known_rows(
    network: nn.Module,
    devices: Iterable[str],
    sizes: Iterable[Size | None],
    observe: Callable[[str, Size], _Found],
) -> _Found:
    try:
        return _first_run(network, devices, sizes, observe)
    except _NothingRunsError as error:
        raise BackboneError(
            f"{type(network).__name__} does not run on images of {_to_try(network, sizes)}, so it "
            "is unknown which rows inside belong to which image."
        ) from error


def rows_astray(network: nn.Module, layers: set[str], sizes: Iterable[Size | None]) -> set[str]:
    """Those of `layers` where the rows of two images do not lie one image after the other.

    The second image is NaN, and what it makes NaN is its own: `torch.cat([x, x.flip(-1)])` puts
    some of that into the first half.

    Args and raises: as `rows_per_image`.
    """
    observe = functools.partial(_nan_in_first_half, network, layers)
    devices = (_own_device(network),)  # on meta there are no numbers
    return _known_rows(network, devices, sizes, observe)


def _nan_in_first_half(network: nn.Module, layers: set[str], device: str, size: Size) -> set[str]:
    found = set[str]()

    def look(name: str, x: Tensor) -> None:
        if x[: len(x) // 2].isnan().any():
            found.add(name)

    images_bchw = example(network, size, device, n_images=2)
    images_bchw[1] = torch.nan
    _watch(network, layers, device, images_bchw, look)
    return found


def _follows(two: set[int], three: set[int]) -> bool:
    """Whether a layer got k rows for each image, of batches of two and of three."""
    return len(two) == len(three) == 1 and 3 * min(two) == 2 * min(three)


def _n_rows(
    network: nn.Module, layers: set[str], size: Size, device: str, n_images: int
) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {}

    def look(name: str, x: Tensor) -> None:
        found.setdefault(name, set()).add(len(x))

    _watch(network, layers, device, example(network, size, device, n_images), look)
    return found


Around = Callable[[nn.Module], contextlib.AbstractContextManager[None]]


def gone_through(
    network: nn.Module,
    layers: set[str],
    sizes: Iterable[Size | None],
    around: Around = lambda _network: contextlib.nullcontext(),
) -> tuple[Any, set[str]]:
    """What the network gives for one image, and those of `layers` that it calls.

    Args:
        sizes: channels, rows, columns, of which the first that runs is taken.
        around: what is entered with the copy that runs, while it does.

    Raises:
        BackboneError: where the network does not run.
    """

    def observe(device: str, size: Size) -> tuple[Any, set[str]]:
        called, image = set[str](), example(network, size, device)

        def look(name: str, _x: Tensor) -> None:
            called.add(name)

        return _watch(network, layers, device, image, look, around), called

    try:
        return _first_run(network, ("meta", _own_device(network)), sizes, observe)
    except _NothingRunsError as error:
        raise BackboneError(
            f"{type(network).__name__} does not run with the domain's classifier and adapters in "
            f"it ({error}). Name the classifier's own layer, head='fc'; where an adapted layer "
            "is the cause, leave it out: where=Where(pattern=...)."
        ) from error


@torch.no_grad()
def _watch(
    network: nn.Module,
    layers: set[str],
    device: str,
    images_bchw: Tensor,
    look: Callable[[str, Tensor], None],
    around: Around = lambda _network: contextlib.nullcontext(),
) -> Any:
    """Runs a copy; `look` gets the name of each of `layers` with what goes in at every call."""
    copied = on_device(network, device)

    def note(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda _module, args: look(name, args[0])

    for name, module in copied.named_modules():
        if name in layers:
            module.register_forward_pre_hook(note(name))
    with _NormsLeftOut() if device == "meta" else contextlib.nullcontext(), around(copied):
        return copied(images_bchw)
