"""Module trees over shared tensors: what `attach` and `merge` are made of.

`copy_tree` copies the modules and not the tensors: every shared parameter of the copy is a new
`Parameter` over the *same storage*, so that one domain's `.to()`, `.half()` or `requires_grad_` can
never reach the backbone or another domain, while memory holds the backbone once.
"""

import copy
import re
import types
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def copy_tree(module: nn.Module, own: Iterable[Tensor] = ()) -> nn.Module:
    """A new module tree over `module`'s tensors, frozen, but for `own`: those are really copied."""
    kept = {id(tensor) for tensor in own}
    memo: dict[int, object] = {}
    for parameter in module.parameters():
        if id(parameter) not in kept:
            memo[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=False)
    users = Counter(storage_key(buffer) for buffer in module.buffers())
    for buffer in module.buffers():
        if id(buffer) not in kept:
            memo[id(buffer)] = buffer.detach()
        elif users[storage_key(buffer)] == 1 and _is_plain(buffer):
            memo[id(buffer)] = buffer.clone()  # deepcopy takes sixteen times as long
    for sub in module.modules():  # a dozen empty hook tables a module: half of deepcopy's time
        for value in vars(sub).values():
            if type(value) in (OrderedDict, dict, set) and not value:
                memo[id(value)] = type(value)()
    return copy.deepcopy(module, memo)


def on_cpu(module: nn.Module) -> nn.Module:
    """`module` itself where all of it is on the CPU, else a copy there."""
    tensors = (*module.parameters(), *module.buffers())
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return module
    return copy_tree(module).cpu()


def _is_plain(tensor: Tensor) -> bool:
    """Whether a clone is all there is to a copy: no view, no subclass, nothing hung on it."""
    whole = tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()
    return type(tensor) is Tensor and not tensor.requires_grad and not vars(tensor) and whole


def reference_of(network: nn.Module) -> Tensor:
    """A parameter that is where, and of the type that, the network takes its images."""
    return next(p for p in network.parameters() if p.is_floating_point())


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers that sit directly on `module`."""
    yield from (p for p in module._parameters.values() if p is not None)
    yield from (b for b in module._buffers.values() if b is not None)


def first_names(module: nn.Module) -> set[str]:
    """One name for each parameter and buffer: the first, where modules or tensors have several."""
    return {name for name, _ in (*module.named_parameters(), *module.named_buffers())}


def replace_module(root: nn.Module, name: str, module: nn.Module) -> None:
    """Puts `module` where `name` is, and wherever else `root` holds that same module."""
    replace_modules(root, {name: module})


def replace_modules(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts each module where its name is, in one walk."""
    new = {id(root.get_submodule(name)): module for name, module in modules.items()}
    for parent in list(root.modules()):
        for key, child in list(parent._modules.items()):
            if id(child) in new:
                setattr(parent, key, new[id(child)])
                _call_children(parent)


def _call_children(parent: nn.Module) -> None:
    """In eval mode torch's encoder layer takes its children's weights and passes them by."""
    if isinstance(parent, nn.TransformerEncoderLayer):
        parent.activation_relu_or_gelu = 0  # without a known activation it calls them


def rewired(root: nn.Module, new: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A tree in which `new` modules stand in for those of `root`, which is left as it was.

    Only the modules above a new one are copied, and shallowly: everything else, every parameter and
    buffer included, is `root`'s own object, so that to train the one tree is to train the other.
    """
    known = dict(new)

    def visited(module: nn.Module) -> nn.Module:
        if module not in known:
            known[module] = module  # for a tree that holds itself
            children = {key: child and visited(child) for key, child in module._modules.items()}
            if any(children[key] is not child for key, child in module._modules.items()):
                known[module] = shell(module)
                known[module]._modules = children
                _call_children(known[module])
        return known[module]

    return visited(root)


def recast(module: nn.Module, behaviour: type[nn.Module]) -> nn.Module:
    """A shallow copy over the same submodules and tensors; `behaviour` goes before its class."""
    twin, cls = shell(module), type(module)
    facts = {"__module__": cls.__module__, "_recast": True}
    twin.__class__ = type(cls.__name__, (behaviour, cls), facts)
    return twin


def is_recast(module: nn.Module) -> bool:
    """Whether `recast` made `module`."""
    return getattr(type(module), "_recast", False)


def shell(module: nn.Module) -> nn.Module:
    """A shallow copy: another object with the same submodules, tensors and hooks."""
    twin = copy.copy(module)
    twin._load_state_dict_pre_hooks = OrderedDict()  # they name the module they were made for
    for name, value in list(vars(twin).items()):  # `self.forward = self.forward_fast`
        if getattr(value, "__self__", None) is module:
            vars(twin)[name] = types.MethodType(value.__func__, twin)
    return twin


_NORMS = (
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
)
_LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
_STANDARDISES = re.compile(r"^Normali[sz]e|Normali[sz]er$")  # Normalize, InputNormalizer


def is_counter(buffer: Tensor) -> bool:
    """A lone whole number may count calls; more of them are a table, which nobody writes to."""
    return buffer.numel() == 1 and not buffer.is_floating_point()


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a norm with numbers of its own, of torch, timm, torchvision or a user.

    By class for torch's own; by name (BatchNormAct2d, LayerNorm2d, FrozenBatchNorm2d, EvoNorm,
    FilterResponseNorm, GlobalResponseNorm, RMSNorm ...) for the rest, but for convolutions and
    linear layers that normalise their weights, and for a `Normalize` of the input.
    """
    if isinstance(module, _NORMS):
        return True
    if isinstance(module, _LAYERS) or hasattr(module, "in_features"):
        return False
    named = "Norm" in (name := type(module).__name__) and not _STANDARDISES.search(name)
    return named and next(own_tensors(module), None) is not None


def draws(module: nn.Module) -> bool:
    """Whether `module` is dropout of some kind that drops, by torch's class or by name."""
    kinds = ("Drop", "StochasticDepth")  # nn.Dropout2d, timm's DropPath, torchvision's
    if not any(kind in type(module).__name__ for kind in kinds):
        return False
    shares = (getattr(module, name, 0) for name in ("p", "drop_prob", "dropout", "prob"))
    return any(isinstance(share, (int, float)) and share > 0 for share in shares)


class Wrapper(nn.Module):
    """A module in the place of a layer that it holds, which others ask it for its facts."""

    layer: nn.Module

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "layer" or "layer" not in self.__dict__.get("_modules", {}):
                raise
            return getattr(self._modules["layer"], name)


def unwrap(root: nn.Module) -> None:
    """Puts the layers of `root` back in the places of their wrappers."""
    wrappers = [(name, m) for name, m in root.named_modules() if isinstance(m, Wrapper)]
    replace_modules(root, {name: wrapper.layer for name, wrapper in wrappers})


class Frozen(Wrapper):
    """A layer kept as it was: in eval mode always, so that `.train()` moves no statistics."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer.eval()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)

    def train(self, mode: bool = True) -> "Frozen":
        super().train(mode)
        self.layer.eval()
        return self


def storage_key(tensor: Tensor) -> tuple[torch.device, int]:
    """Equal for two tensors over one storage."""
    return tensor.device, tensor.untyped_storage().data_ptr()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors, on whatever devices, have one type, one shape and the same bytes."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return torch.equal(_bytes(a), _bytes(b))


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def frozen_pairs(
    model: nn.Module, backbone: nn.Module, frozen: Iterable[str]
) -> Iterator[tuple[Tensor, Tensor, str]]:
    """(tensor in `model`, the backbone's own, its name there) for every shared tensor."""
    inside, theirs, originals = model.state_dict(), backbone.state_dict(), original_names(model)
    for name in sorted(frozen):
        yield inside[name], theirs[originals[name]], originals[name]


def original_names(model: nn.Module) -> dict[str, str]:
    """Name in `state_dict()` -> name in the backbone, of all that has one: adapters have none.

    A wrapped layer's tensors are called `site.layer.weight` in the model, `site.weight` in the
    backbone.
    """
    wrapped = {
        name
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, Wrapper)
    }
    found = ((name, _unwrapped(name, wrapped)) for name in model.state_dict())
    return {name: original for name, original in found if original is not None}


def _unwrapped(name: str, wrapped: set[str]) -> str | None:
    """`site.weight` for `site.layer.weight`, where `site` is a wrapper; None beside the layer."""
    parts = name.split(".")
    for k, part in enumerate(parts):
        if ".".join(parts[:k]) in wrapped:
            return ".".join(parts[:k] + parts[k + 1 :]) if part == "layer" else None
    return name
