"""The cut: where the frozen trunk of a domain's network ends; found by running it, proved likewise.

Below the cut nothing is trained, no statistics move and nothing is dropped at random, and one
tensor is all that comes out: the features. The tail is the same network without the trunk: the
same parameters, statistics and names, features in the place of images. In place of what ran before
the cut it has stubs that give NaN of the right shape, which cost nothing; if anything but the
features mattered to what comes later, the logits would be NaN.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.domain import domain_of, mark
from ..core.tree import draws, recast, rewired, shell
from ..errors import TrainingError
from .randomness import own_draws, reseed

CLOSE = 1e-3  # of the largest number: for batches of other sizes, and on GPUs, which round freely
LEAST_SHARE = 0.1  # of the multiply-adds: below, features take memory and hardly save time
N_OBSERVED = 2  # images of the run that is observed; the proof takes one more, so shapes must scale


@dataclass(frozen=True)
class Cut:
    """Where a network is cut.

    Args:
        at: the module whose only input is the features.
        shape: of one image's features.
        order: the features' axes from the outermost in memory to the innermost; batches first.
        dtype: the features' type.
        image: channels, rows, columns of the images that the network takes.
        share: of the network's multiply-adds, those below the cut.
        trunk: the names in `state_dict()` of all that the features follow from.
    """

    at: str
    shape: tuple[int, ...]
    order: tuple[int, ...]
    dtype: torch.dtype
    image: tuple[int, ...]
    share: float
    trunk: tuple[str, ...]

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Of one image's features as they are stored."""
        return tuple(self.shape[axis - 1] for axis in self.order[1:])

    def packed(self, z: Tensor) -> Tensor:
        """Features as they are stored: contiguous in the order that they have in memory."""
        return z.permute(self.order).contiguous()

    def unpacked(self, packed: Tensor) -> Tensor:
        """Stored features as the network had them: the same numbers with the same strides."""
        return packed.permute([self.order.index(axis) for axis in range(packed.ndim)])


@dataclass(frozen=True)
class _Call:
    """One call of a module: when it began and ended, what went in and came out."""

    began: int
    ended: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    y: Any

    @property
    def takes_one_tensor(self) -> bool:
        rest = [*self.args[1:], *self.kwargs.values()]
        first = self.args[0] if self.args else None
        return isinstance(first, Tensor) and not any(isinstance(value, Tensor) for value in rest)


def cut_off(model: nn.Module, x_bchw: Tensor) -> tuple[Cut, nn.Module]:
    """Where the frozen trunk of a domain's network ends, and the tail that is left without it.

    The tail has shown on `x_bchw` that it computes what the network does: the same logits in train
    and eval mode, gradients and statistics, bit for bit (on a GPU: within 1e-3).

    Args:
        model: a domain's network, which is left as it was.
        x_bchw: at least three images as they are in training.

    Raises:
        TrainingError: where there is no trunk, or no place through which all goes.
    """
    with _undisturbed(model):
        model.train()
        calls, chain = _observed(model, x_bchw[:N_OBSERVED], _moving(model, x_bchw[:N_OBSERVED]))
        reason = "nothing is before it"
        for module in reversed(chain):
            if len(calls[module]) != 1 or not _takes_features(calls[module][0]):
                continue
            stubs = _stubs(model, calls, calls[module][0].began)
            if not stubs:
                break
            share = _share_below(calls, calls[module][0].began)
            if share < LEAST_SHARE:
                reason = f"only {share:.1%} of the multiply-adds are before it"
                break
            cut = _cut_at(model, module, calls, tuple(x_bchw.shape[1:]), share)
            tail = _tail(model, cut, stubs)
            found = _difference(model, tail, cut, x_bchw)
            if found is None:
                return cut, tail
            reason = found
    first = _name_of(model, chain[-1]) or type(model).__name__
    raise TrainingError(
        f"this network has no frozen trunk to take features from: {first} learns (it is trained, "
        f"keeps statistics or drops at random), and {reason}. Adapt late layers only and keep the "
        "norms before them: attach(backbone, family, classes, where=Where(stages='late'), "
        "norms='placed')."
    )


def features(model: nn.Module, cut: Cut, x_bchw: Tensor) -> Tensor:
    """What reaches the cut, in the mode that the network is in; what is above does not run."""

    def stop(_module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _Reached(args[0].detach())

    with model.get_submodule(cut.at).register_forward_pre_hook(stop):
        try:
            model(x_bchw)
        except _Reached as reached:
            return reached.z
    raise TrainingError(f"the network did not come to {cut.at}, where it was cut for features.")


class _Reached(Exception):
    """Carries the features out of a forward pass."""

    def __init__(self, z: Tensor) -> None:
        super().__init__()
        self.z = z


class _Stub(nn.Module):
    """In the place of a module of the trunk: NaN of the shape that it gave, in no memory."""

    def __init__(self, stands_for: nn.Module, n_in: int, y: Tensor) -> None:
        super().__init__()
        self.__dict__["stands_for"] = stands_for  # unregistered: its tensors are not the tail's
        self.n_in, self.shape, self.dtype = n_in, y.shape, y.dtype

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        x = _first_tensor((*args, *kwargs.values()))
        assert x is not None  # as when it was observed
        n_out = len(x) * self.shape[0] // self.n_in
        return _nan(x, self.dtype).expand(n_out, *self.shape[1:])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["stands_for"], name)

    def __deepcopy__(self, memo: object) -> "_Stub":
        return self  # holds nothing that could change


class _FromFeatures(nn.Module):
    """What a tail's class does before its own: takes features for images."""

    cut: Cut

    def forward(self, z: Tensor) -> Any:
        if tuple(z.shape[1:]) != self.cut.shape:
            raise TrainingError(
                f"this is the tail of a network, which takes features of shape {self.cut.shape}, "
                f"and was given {tuple(z.shape[1:])}: give it what `cached` made, and images to "
                "the domain's own network."
            )
        blank_bchw = _nan(z, z.dtype).expand(len(z), *self.cut.image)
        at = self.get_submodule(self.cut.at)
        with at.register_forward_pre_hook(lambda _module, args: (z, *args[1:])):
            return super().forward(blank_bchw)


def _nan(like: Tensor, dtype: torch.dtype) -> Tensor:
    return like.new_full((), float("nan"), dtype=dtype)


def _first_tensor(values: Sequence[Any]) -> Tensor | None:
    return next((value for value in values if isinstance(value, Tensor)), None)


@torch.no_grad()
def _moving(model: nn.Module, x_bchw: Tensor) -> set[nn.Module]:
    """The modules with buffers that a training pass writes to."""
    before = [(m, b, b.clone()) for m in model.modules() for b in m.buffers(recurse=False)]
    with own_draws(x_bchw.device):
        model(x_bchw)
    return {module for module, buffer, value in before if not torch.equal(buffer, value)}


def _observed(
    model: nn.Module, x_bchw: Tensor, moving: set[nn.Module]
) -> tuple[dict[nn.Module, list[_Call]], list[nn.Module]]:
    """Every module's calls; the first that learns, with those around it before it."""
    calls: dict[nn.Module, list[_Call]] = {module: [] for module in model.modules()}
    chain: list[nn.Module] = []
    running: list[tuple[nn.Module, int]] = []
    clock = 0

    def began(module: nn.Module, _args: Any) -> None:
        nonlocal clock
        clock += 1
        running.append((module, clock))
        if not chain and (module in moving or _learns(module)):
            chain.extend(module for module, _ in running)

    def ended(module: nn.Module, args: Any, kwargs: Any, y: Any) -> None:
        nonlocal clock
        clock += 1
        calls[module].append(_Call(running.pop()[1], clock, args, kwargs, y))

    hooks: list[Any] = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(began))
        hooks.append(module.register_forward_hook(ended, with_kwargs=True))
    try:
        with own_draws(x_bchw.device):
            model(x_bchw)
    finally:
        for hook in hooks:
            hook.remove()
    return calls, chain or [model]


def _learns(module: nn.Module) -> bool:
    """Whether a module itself changes in training, draws numbers, or looks at the whole batch."""
    if any(p is not None and p.requires_grad for p in module._parameters.values()):
        return True
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return module.training or module.running_mean is None
    return module.training and draws(module)


def _takes_features(call: _Call) -> bool:
    if not call.takes_one_tensor:
        return False
    z: Tensor = call.args[0]
    return z.ndim > 1 and len(z) == N_OBSERVED and z.is_floating_point() and not z.requires_grad


def _share_below(calls: dict[nn.Module, list[_Call]], began: int) -> float:
    below = everything = 0.0
    for module, made in calls.items():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            n_out = module.out_features if isinstance(module, nn.Linear) else module.out_channels
            for call in made:
                y = _first_tensor(call.y if isinstance(call.y, (tuple, list)) else (call.y,))
                multiply_adds = 0.0 if y is None else y.numel() / n_out * module.weight.numel()
                everything += multiply_adds
                below += multiply_adds if call.ended < began else 0
    return below / max(everything, 1)


def _cut_at(
    model: nn.Module,
    module: nn.Module,
    calls: dict[nn.Module, list[_Call]],
    image: tuple[int, ...],
    share: float,
) -> Cut:
    (call,) = calls[module]
    z: Tensor = call.args[0]
    strides = z.stride()
    order = (0, *sorted(range(1, z.ndim), key=lambda axis: -strides[axis]))
    # a module that is never called may be looked into by one that is
    below = {m for m, made in calls.items() if not made or made[0].began < call.began}
    trunk = tuple(
        name for name in model.state_dict() if model.get_submodule(name.rpartition(".")[0]) in below
    )
    return Cut(_name_of(model, module), tuple(z.shape[1:]), order, z.dtype, image, share, trunk)


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next(name for name, found in model.named_modules() if found is module)


def _stubs(
    module: nn.Module, calls: dict[nn.Module, list[_Call]], cut_began: int
) -> dict[nn.Module, nn.Module]:
    """For every module that was done with before the cut began: what gives its shape alone."""
    stubs: dict[nn.Module, nn.Module] = {}
    for child in module.children():
        stub = _stub(child, calls[child], cut_began)
        stubs |= _stubs(child, calls, cut_began) if stub is None else {child: stub}
    return stubs


def _stub(module: nn.Module, calls: list[_Call], cut_began: int) -> nn.Module | None:
    if not calls or any(call.ended > cut_began for call in calls):
        return None
    x, y = _first_tensor([*calls[0].args, *calls[0].kwargs.values()]), calls[0].y
    if x is None or not x.ndim or not isinstance(y, Tensor) or not y.is_floating_point():
        return None
    if any(not isinstance(call.y, Tensor) or call.y.shape != y.shape for call in calls):
        return None
    return _Stub(module, len(x), y) if y.ndim else None


def _tail(model: nn.Module, cut: Cut, stubs: dict[nn.Module, nn.Module]) -> nn.Module:
    at = model.get_submodule(cut.at)
    own_at = shell(at)  # what the tail hooks to it must not reach the network's own
    own_at._forward_pre_hooks = at._forward_pre_hooks.copy()
    tail: Any = recast(rewired(model, {**stubs, at: own_at}), _FromFeatures)
    tail.cut, domain = cut, domain_of(model)
    mark(tail, replace(domain, frozen=domain.frozen & tail.state_dict().keys()))
    return tail


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Modes and buffers are afterwards what they were."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        before = [(buffer, buffer.clone()) for buffer in model.buffers()]
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        _put_back(before)


@torch.no_grad()
def _put_back(before: Sequence[tuple[Tensor, Tensor]]) -> None:
    for buffer, value in before:
        if not torch.equal(buffer, value):  # what is shared is not written to
            buffer.copy_(value)


def _difference(model: nn.Module, tail: nn.Module, cut: Cut, x_bchw: Tensor) -> str | None:
    """What the tail on features computes otherwise than the network on images; None if nothing."""
    try:
        for train in (False, True):
            model.train(train)
            z = features(model, cut, x_bchw)
            if len(z) != len(x_bchw):
                return f"what goes into {cut.at} has no row for each image"
            if not is_close(features(model, cut, x_bchw[:1]), z[:1]):
                return f"what goes into {cut.at} depends on chance or on the rest of the batch"
            found = _computed(tail.train(train), cut.unpacked(cut.packed(z)))
            if not _same(found, _computed(model.train(train), x_bchw)):
                return f"what comes after the input of {cut.at} depends on more than that input"
    except Exception as error:  # whatever a user's forward raises is only reported
        return f"the rest does not run on the input of {cut.at} ({_line(error)})"
    return None


def _computed(network: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Logits, gradients and buffers of one pass from one seed; the buffers are then as before."""
    before = [(buffer, buffer.clone()) for buffer in network.buffers()]
    trained = [p for p in network.parameters() if p.requires_grad]
    with own_draws(x.device):
        reseed(0, x.device)
        y = network(x)
        y = y if isinstance(y, Tensor) else y[0]
        loss = (y * torch.linspace(-1, 1, y.numel()).to(y).view_as(y)).sum()
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    moved = [buffer.clone() for buffer, value in before if not torch.equal(buffer, value)]
    _put_back(before)
    return [y.detach(), *gradients, *moved]


def _same(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    return len(found) == len(expected) and all(
        a is b if a is None or b is None else _equal(a, b)
        for a, b in zip(found, expected, strict=True)
    )


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.device.type == "cpu" or not a.is_floating_point():
        return torch.equal(a, b)
    return is_close(a, b)


def is_close(a: Tensor, b: Tensor) -> bool:
    """Within 1e-3 of the largest number: equal but for rounding."""
    return torch.allclose(a, b, rtol=0, atol=CLOSE * float(b.abs().max()))


def _line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
