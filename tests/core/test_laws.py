"""The laws: what every adapter family keeps at every kind of layer, in float64.

The table is generated from FAMILIES: a family that is registered without a case here fails, and a
new case inherits every law. Layers that a family refuses are left out of its cases.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.linear import Linear as TimmLinear
from timm.layers.std_conv import ScaledStdConv2d, ScaledStdConv2dSame, StdConv2d, StdConv2dSame
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import fingerprint
from onetrunk.core import fused
from onetrunk.core.adapted import Adapted
from onetrunk.core.adapters import FAMILIES, Family, read_family
from onetrunk.core.attach import attach
from onetrunk.core.cost import cost
from onetrunk.core.domain import delta
from onetrunk.core.merge import merge
from onetrunk.core.sites import Site, site_of
from onetrunk.core.tree import own_tensors, storage_key

# torch says once that it pads a copy for an even kernel and padding="same"
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")

EVERYWHERE = ot.Where(layers="all")
SIZES = ((13, 12), (16, 16), (10, 9))


@dataclass(frozen=True)
class Case:
    """A family with its options, and where `attach` places it."""

    family: Family
    where: ot.Where | None = EVERYWHERE

    def __str__(self) -> str:
        return f"{self.family}{'' if self.where else '-whole'}"

    @property
    def starts_as_backbone(self) -> bool:
        return getattr(self.family, "init", "identity") == "identity"


CASES = (
    Case(ot.Series()),
    Case(ot.Series(init="released")),
    Case(ot.Parallel()),
    Case(ot.Parallel(init="released", dropout=0.5)),
    Case(ot.LowRank(rank=1)),
    Case(ot.LowRank(rank=3)),
    Case(ot.LowRank(rank=2, init="released", dropout=0.5)),
    Case(ot.Channelwise()),
    Case(ot.Norm(), where=None),
    Case(ot.Full()),
    Case(ot.Full(), where=None),
    Case(ot.Head(), where=None),
)

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "3x3": lambda: nn.Conv2d(6, 8, 3, padding=1, bias=False),
    "3x3 bias": lambda: nn.Conv2d(6, 8, 3, padding=1),
    "3x3 strided": lambda: nn.Conv2d(6, 8, 3, 2, 1, bias=False),
    "3x3 dilated": lambda: nn.Conv2d(6, 8, 3, padding=2, dilation=2, bias=False),
    "3x3 dilated, padding between taps": lambda: nn.Conv2d(6, 8, 3, padding=1, dilation=2),
    "3x3 grouped": lambda: nn.Conv2d(6, 8, 3, padding=1, groups=2),
    "3x3 grouped, strided": lambda: nn.Conv2d(6, 9, 3, 2, 1, groups=3, bias=False),
    "3x3 depthwise": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False),
    "3x3 depthwise, two a channel": lambda: nn.Conv2d(6, 12, 3, padding=1, groups=6),
    "1x1": lambda: nn.Conv2d(6, 8, 1, bias=False),
    "1x1 strided": lambda: nn.Conv2d(6, 8, 1, 2),
    "1x1 over-padded": lambda: nn.Conv2d(6, 8, 1, padding=1),
    "5x5": lambda: nn.Conv2d(6, 8, 5, padding=2),
    "patchify 4x4": lambda: nn.Conv2d(6, 8, 4, 4),
    "patchify 2x2": lambda: nn.Conv2d(6, 8, 2, 2, bias=False),
    "7x7 stride 4": lambda: nn.Conv2d(6, 8, 7, 4, 3, bias=False),
    "4x4 padding 1": lambda: nn.Conv2d(6, 8, 4, 2, 1),
    "1x5 stride (2, 1)": lambda: nn.Conv2d(6, 8, (1, 5), (2, 1), (0, 2)),
    "3x2 padding (1, 0)": lambda: nn.Conv2d(6, 8, (3, 2), 1, (1, 0), bias=False),
    "3x3 valid": lambda: nn.Conv2d(6, 8, 3),
    "3x3 padding='valid'": lambda: nn.Conv2d(6, 8, 3, padding="valid"),
    "3x3 over-padded": lambda: nn.Conv2d(6, 8, 3, padding=3),
    "3x3 padding='same'": lambda: nn.Conv2d(6, 8, 3, padding="same"),
    "4x4 padding='same'": lambda: nn.Conv2d(6, 8, 4, padding="same", bias=False),
    "3x3 padding='same', dilated": lambda: nn.Conv2d(6, 8, 3, padding="same", dilation=2),
    "3x3 reflect": lambda: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect"),
    "3x3 circular": lambda: nn.Conv2d(6, 8, 3, 2, 1, padding_mode="circular", bias=False),
    "5x5 replicate": lambda: nn.Conv2d(6, 8, 5, padding=2, padding_mode="replicate"),
    "Conv2dSame": lambda: Conv2dSame(6, 8, 3),
    "Conv2dSame strided": lambda: Conv2dSame(6, 8, 3, 2, bias=False),
    "Conv2dSame 4x4 strided": lambda: Conv2dSame(6, 8, 4, 2),
    "Conv2dSame depthwise": lambda: Conv2dSame(6, 6, 5, 2, groups=6, bias=False),
    "StdConv2d": lambda: StdConv2d(6, 8, 3, padding=1),
    "StdConv2dSame": lambda: StdConv2dSame(6, 8, 3, 2, padding="SAME"),
    "ScaledStdConv2d": lambda: ScaledStdConv2d(6, 8, 3, padding=1, groups=2),
    "ScaledStdConv2dSame": lambda: ScaledStdConv2dSame(6, 8, 3, 2, padding="SAME"),
    "linear bf": lambda: nn.Linear(6, 8),
    "linear bnf": lambda: nn.Linear(6, 8, bias=False),
    "linear bhwf": lambda: nn.Linear(6, 8),
    "timm's linear bnf": lambda: TimmLinear(6, 8),
}


class OneLayer(nn.Module):
    """The layer under test, a norm, GELU (never flat), mean, head; images (b, 6, h, w)."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.layer = kind, LAYERS[kind]()
        o = getattr(self.layer, "out_channels", 8)
        norm = nn.BatchNorm1d if kind == "linear bf" else nn.BatchNorm2d
        self.norm = nn.LayerNorm(o) if kind.endswith(("bnf", "bhwf")) else norm(o)
        self.head = nn.Linear(o, 4)

    def features(self, x_bihw: Tensor) -> Tensor:
        if self.kind == "linear bf":
            x_bihw = x_bihw.mean((2, 3))
        elif self.kind.endswith("bnf"):
            x_bihw = x_bihw.flatten(2).transpose(1, 2)
        elif self.kind.endswith("bhwf"):
            x_bihw = x_bihw.permute(0, 2, 3, 1)
        y = nn.functional.gelu(self.norm(self.layer(x_bihw)))
        if y.ndim == 2:
            return y
        return y.flatten(1, -2).mean(1) if "linear" in self.kind else y.mean((2, 3))

    def forward(self, x_bihw: Tensor) -> Tensor:
        return self.head(self.features(x_bihw))


class Mixed(nn.Module):
    """Plain, strided, grouped and depthwise convolutions, two kinds of norm, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.Conv2d(8, 12, 3, 2, 1),
            nn.BatchNorm2d(12),
            nn.GELU(),
            nn.Conv2d(12, 12, 3, padding=1, groups=3, bias=False),
            nn.GroupNorm(3, 12),
            nn.Conv2d(12, 12, 3, padding=1, groups=12),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(12, 10),
            nn.GELU(),
        )
        self.head = nn.Linear(10, 5)

    def forward(self, x_bihw: Tensor) -> Tensor:
        return self.head(self.body(x_bihw))


@torch.no_grad()
def randomised(module: nn.Module, tensors: dict[str, Tensor], seed: int) -> nn.Module:
    """`module` with `tensors` of its own at random, away from every neutral value."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            drawn = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            tensor.copy_(drawn.abs() + 0.5 if name.endswith("running_var") else 0.5 * drawn)
    return module


def one_layer(kind: str) -> nn.Module:
    net = OneLayer(kind).double().eval()
    return randomised(net, net.state_dict(), seed=1)


def mixed() -> nn.Module:
    net = Mixed().double().eval()
    return randomised(net, net.state_dict(), seed=2)


def domain(net: nn.Module, case: Case, seed: int = 0) -> nn.Module:
    size = (6, 13, 12) if isinstance(net, OneLayer) else (3, 9, 8)
    names = ["a", "b", "c"]
    kind = {"input_size": size, "head": "head", "seed": seed}
    return attach(net, case.family, names, where=case.where, **kind).eval()


def shaken(model: nn.Module, seed: int = 3) -> nn.Module:
    return randomised(model, delta(model), seed)


def images(channels: int, h: int, w: int, seed: int = 4, n: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((n, channels, h, w), generator=generator, dtype=torch.float64)


def train(model: nn.Module, x_bihw: Tensor, steps: int = 2) -> None:
    model.train()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(own, lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x_bihw), torch.arange(len(x_bihw)) % 3).backward()
        optimizer.step()
    model.eval()


def bytes_of(tensors: dict[str, Tensor]) -> dict[str, bytes]:
    return {name: t.detach().numpy().tobytes() for name, t in tensors.items()}


def site(kind: str) -> Site:
    found = site_of("layer", LAYERS[kind]())
    assert isinstance(found, Site), f"{kind}: {found}"
    return found


FITTING = [
    pytest.param(case, kind, id=f"{case} {kind}")
    for case in CASES
    for kind in LAYERS
    if case.family.refuses(site(kind)) is None
]
PLACED = [
    p for p in FITTING if p.values[0].where and p.values[0].family.scope == "adapters"
]  # those that put an adapter beside the layer
SHARING = [p for p in FITTING if not isinstance(p.values[0].family, ot.Full)]  # a forward
STARTING_AS_BACKBONE = [p for p in FITTING if p.values[0].starts_as_backbone]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


def test_every_registered_family_has_a_case() -> None:
    assert {type(case.family) for case in CASES} == set(FAMILIES.values())


def test_both_initialisations_have_a_case_wherever_a_family_has_them() -> None:
    for family in FAMILIES.values():
        if "init" in family.__dataclass_fields__:
            met = {case.family.init for case in CASES if isinstance(case.family, family)}
            assert met == {"identity", "released"}, family.name


@pytest.mark.parametrize(("case", "kind"), STARTING_AS_BACKBONE)
def test_identity_a_fresh_domain_computes_the_backbones_features_bit_for_bit(
    case: Case, kind: str
) -> None:
    # torch takes another matrix product for weights that require gradients, no_grad or not
    net = one_layer(kind).requires_grad_(case.family.scope == "everything")
    model = domain(net, case)
    for h, w in SIZES:
        x_bihw = images(6, h, w)
        assert torch.equal(model.features(x_bihw), net.features(x_bihw))


@pytest.mark.parametrize(("case", "kind"), FITTING)
def test_merging_changes_nothing_at_any_input_size(case: Case, kind: str) -> None:
    model = shaken(domain(one_layer(kind), case))
    merged = merge(model)
    for h, w in SIZES:
        y, y_merged = model(images(6, h, w)), merged(images(6, h, w))
        assert (y_merged - y).abs().max() <= 1e-10 * y.abs().max()


@pytest.mark.parametrize(("case", "kind"), PLACED)
def test_every_adapter_number_learns_and_nothing_frozen_gets_a_gradient(
    case: Case, kind: str
) -> None:
    model = shaken(domain(one_layer(kind), case))
    model(images(6, 13, 12)).square().sum().backward()
    own = set(delta(model))
    for name, parameter in model.named_parameters():
        if name not in own:
            assert parameter.grad is None and not parameter.requires_grad, name
        elif ".adapter." in name:
            assert (parameter.grad != 0).all(), name
        else:
            assert parameter.grad.any(), name


@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels last"])
@pytest.mark.parametrize(("case", "kind"), PLACED)
def test_the_fused_training_step_is_the_plain_one(
    case: Case, kind: str, channels_last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fused, "pays", lambda adapter, site: True)
    net, layout = one_layer(kind), torch.channels_last if channels_last else torch.preserve_format
    model = shaken(domain(net.to(memory_format=layout), case)).train()
    for h, w in SIZES:
        results = []
        for way in (Adapted.forward, Adapted.plain):
            x_bihw = images(6, h, w).to(memory_format=layout).requires_grad_()
            with monkeypatch.context() as patch:
                patch.setattr(Adapted, "forward", way)
                torch.manual_seed(0)  # of dropout
                features = model.features(x_bihw)
            own = [p for p in model.parameters() if p.requires_grad]
            loss = features.square().sum() + model.head(features).square().sum()
            results.append([features, *torch.autograd.grad(loss, [x_bihw, *own])])
        for ours, plain in zip(*results, strict=True):
            assert (ours - plain).abs().max() <= 1e-10 * plain.abs().max()


@pytest.mark.parametrize("channels_last", [False, True], ids=["rows", "channels last"])
@pytest.mark.parametrize(("case", "kind"), SHARING)
def test_a_mixed_row_is_its_own_domains(case: Case, kind: str, channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.preserve_format
    net = one_layer(kind).to(memory_format=layout)
    cases = (case, case, Case(ot.Norm(), None), Case(ot.Channelwise()), Case(ot.Head(), None))
    models = {str(k): shaken(domain(net, c, k), 5 + k) for k, c in enumerate(cases)}
    mixed, rows = ot.mix(models), ["1", "4", "0", "2", "1", "3"]
    for h, w in SIZES:
        x_bihw = images(6, h, w, n=len(rows)).to(memory_format=layout)
        expected = [models[name](x_bihw)[k] for k, name in enumerate(rows)]
        for ours, own in zip(mixed(x_bihw, rows), expected, strict=True):
            assert (ours - own).abs().max() <= 1e-10 * own.abs().max()


@pytest.mark.parametrize(("case", "kind"), PLACED)
def test_the_counted_numbers_are_those_of_the_built_adapter_and_of_cost(
    case: Case, kind: str
) -> None:
    adapter = case.family.build(site(kind))
    held = sum(t.numel() for t in adapter.state_dict().values())
    model = domain(one_layer(kind), case)
    (at_site,) = cost(model, (6, 13, 12)).sites
    assert case.family.n_numbers(site(kind)) == held == at_site.numbers
    assert cost(model, (6, 13, 12)).adapters == held


@pytest.mark.parametrize("kind", LAYERS)
def test_full_at_a_site_counts_the_layers_own_numbers(kind: str) -> None:
    model = domain(one_layer(kind), Case(ot.Full()))
    (at_site,) = cost(model, (6, 13, 12)).sites
    held = sum(t.numel() for t in own_tensors(model.layer))
    assert ot.Full().n_numbers(site(kind)) == held == at_site.numbers


@every_case
def test_a_merged_network_has_nothing_of_onetrunk_and_shares_no_storage(case: Case) -> None:
    net = mixed()
    model = shaken(domain(net, case))
    merged = merge(model)
    assert not [m for m in merged.modules() if type(m).__module__.startswith("onetrunk")]
    assert not hasattr(merged, "domain") and not merged._load_state_dict_pre_hooks
    theirs = {storage_key(t) for n in (net, model) for t in n.state_dict().values()}
    assert not [n for n, t in merged.state_dict().items() if storage_key(t) in theirs]
    merged.load_state_dict({n: t + 1 for n, t in merged.state_dict().items()})  # ordinary again


@every_case
def test_training_one_domain_moves_no_other_and_not_the_backbone(case: Case) -> None:
    net, x_bihw = mixed(), images(3, 9, 8)
    first, second, third = (domain(net, case, seed) for seed in range(3))
    print_of_backbone, logits_of_backbone = fingerprint(net), net(x_bihw)
    before = {m: (m(x_bihw), bytes_of(m.state_dict())) for m in (second, third)}
    own_before = bytes_of(delta(first))
    train(first, x_bihw)
    assert bytes_of(delta(first)) != own_before
    assert fingerprint(net) == print_of_backbone and torch.equal(net(x_bihw), logits_of_backbone)
    for model, (logits, stored) in before.items():
        assert torch.equal(model(x_bihw), logits) and bytes_of(model.state_dict()) == stored


@every_case
def test_train_mode_moves_statistics_of_this_domain_only(case: Case) -> None:
    net, x_bihw = mixed(), images(3, 9, 8)
    first, second = domain(net, case), domain(net, case)
    before, theirs = fingerprint(net), bytes_of(second.state_dict())
    first.train()(x_bihw)
    assert fingerprint(net) == before and bytes_of(second.state_dict()) == theirs
    assert not net.training and not second.training


@every_case
@pytest.mark.parametrize("change", ["half", "to meta", "requires_grad_", "zero own", "deep copy"])
def test_changing_one_domain_in_place_reaches_no_other(case: Case, change: str) -> None:
    net, x_bihw = mixed(), images(3, 9, 8)
    first, second = domain(net, case), domain(net, case)
    flags = [p.requires_grad for m in (net, second) for p in m.parameters()]
    logits, before = second(x_bihw), fingerprint(net)
    if change == "half":
        first.half()
    elif change == "to meta":
        first.to("meta")
    elif change == "requires_grad_":
        first.requires_grad_(True)
    elif change == "zero own":
        for tensor in delta(first).values():
            tensor.zero_()
    else:
        import copy

        shaken(copy.deepcopy(first))
    assert torch.equal(second(x_bihw), logits) and fingerprint(net) == before
    assert [p.requires_grad for m in (net, second) for p in m.parameters()] == flags
    assert {t.dtype for t in second.state_dict().values()} <= {torch.float64, torch.int64}


@every_case
def test_ten_domains_hold_the_backbone_once_and_ten_deltas(case: Case) -> None:
    net = mixed()
    models = [domain(net, case, seed) for seed in range(10)]
    storages = {
        storage_key(t): t.untyped_storage().nbytes()
        for n in (net, *models)
        for t in n.state_dict().values()
    }
    bytes_each = sum(t.nbytes for t in delta(models[0]).values())
    assert sum(storages.values()) == sum(t.nbytes for t in net.state_dict().values()) + (
        10 * bytes_each
    )


@every_case
def test_the_written_form_reads_back(case: Case) -> None:
    assert read_family(str(case.family)) == case.family


@every_case
def test_one_seed_gives_one_network_and_the_global_generator_stays(case: Case) -> None:
    net = mixed()
    state = torch.random.get_rng_state()
    one, same, other = (bytes_of(delta(domain(net, case, seed))) for seed in (5, 5, 6))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert one == same != other


def test_merging_a_thousand_times_gives_the_first_merge_bit_for_bit() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.Conv2d(4, 4, 1),
        nn.Flatten(),
        nn.Linear(16, 4),
        nn.Linear(4, 4),
        nn.Linear(4, 3),
    ).double()
    families = (ot.Series(), ot.Parallel(), ot.LowRank(rank=2), ot.Channelwise())
    plan = dict(zip(("0", "2", "4", "5"), families, strict=True))
    model = shaken(attach(net, plan, ["a", "b"], input_size=(2, 4, 4)))
    before = fingerprint(net)
    first = bytes_of(merge(model).state_dict())
    assert all(bytes_of(merge(model).state_dict()) == first for _ in range(999))
    assert fingerprint(net) == before


# The folds and forwards against explicit loops, on a grouped, strided convolution.


def conv_loop(x: Tensor, w: Tensor, b: Tensor, stride: int, pad: int, groups: int) -> Tensor:
    """y[n, o, p, q] = b[o] + sum over i, k, l of w[o, i, k, l] x[n, i, s p - pad + k, ...]."""
    n_images, _, h, width = x.shape
    n_out, per_group, kernel, _ = w.shape
    side_h, side_w = ((s + 2 * pad - kernel) // stride + 1 for s in (h, width))
    y = torch.zeros(n_images, n_out, side_h, side_w, dtype=x.dtype)
    for o in range(n_out):
        first = o // (n_out // groups) * per_group
        for p in range(side_h):
            for q in range(side_w):
                y[:, o, p, q] = b[o]
                for k in range(kernel):
                    for l in range(kernel):
                        row, column = stride * p - pad + k, stride * q - pad + l
                        if 0 <= row < h and 0 <= column < width:
                            for i in range(per_group):
                                y[:, o, p, q] += w[o, i, k, l] * x[:, first + i, row, column]
    return y


def series_loop(adapter: nn.Module, y: Tensor, x: Tensor, stride: int, groups: int) -> Tensor:
    norm, a, out = adapter.norm, adapter.a_oo, y.clone()
    per_group = y.shape[1] // groups
    for o in range(y.shape[1]):
        for j in range(per_group):
            source = o // per_group * per_group + j
            scale = norm.weight[source] / (norm.running_var[source] + norm.eps).sqrt()
            normed = (y[:, source] - norm.running_mean[source]) * scale + norm.bias[source]
            out[:, o] += a[o, j] * normed
    return out


def parallel_loop(adapter: nn.Module, y: Tensor, x: Tensor, stride: int, groups: int) -> Tensor:
    return add_mixed(y, x, adapter.a_oi, stride, groups)


def lowrank_loop(adapter: nn.Module, y: Tensor, x: Tensor, stride: int, groups: int) -> Tensor:
    u, v = adapter.u_or, adapter.v_ri
    rank, a = u.shape[1], torch.zeros(y.shape[1], x.shape[1] // groups, dtype=x.dtype)
    for o in range(a.shape[0]):
        group = o // (a.shape[0] // groups)
        for i in range(a.shape[1]):
            for r in range(rank):
                a[o, i] += u[o, r] * v[group * rank + r, i]
    return add_mixed(y, x, a, stride, groups)


def channelwise_loop(adapter: nn.Module, y: Tensor, x: Tensor, stride: int, groups: int) -> Tensor:
    return torch.stack(
        [adapter.s_o[o] * y[:, o] + adapter.t_o[o] for o in range(y.shape[1])], dim=1
    )


def add_mixed(y: Tensor, x: Tensor, a: Tensor, stride: int, groups: int) -> Tensor:
    out = y.clone()
    for o in range(y.shape[1]):
        first = o // (y.shape[1] // groups) * a.shape[1]
        for p in range(y.shape[2]):
            for q in range(y.shape[3]):
                for i in range(a.shape[1]):
                    out[:, o, p, q] += a[o, i] * x[:, first + i, stride * p, stride * q]
    return out


LOOPS = {
    ot.Series(): series_loop,
    ot.Parallel(): parallel_loop,
    ot.LowRank(rank=2): lowrank_loop,
    ot.Channelwise(): channelwise_loop,
}


def test_every_family_with_an_adapter_has_a_loop() -> None:
    with_adapter = {type(c.family) for c in CASES if c.family.build(site("3x3")) is not None}
    assert {type(family) for family in LOOPS} == with_adapter


@pytest.mark.parametrize("family", LOOPS, ids=str)
@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (1, 2), (2, 2)])
@torch.no_grad()
def test_forward_and_fold_equal_explicit_loops(family: Family, stride: int, groups: int) -> None:
    conv = nn.Conv2d(4, 6, 3, stride, 1, groups=groups).double()
    randomised(conv, conv.state_dict(), seed=7)
    found = site_of("conv", conv)
    adapter = family.build(found).double().eval()
    randomised(adapter, adapter.state_dict(), seed=8)
    x_bihw = images(4, 5, 4, n=2)
    y = conv_loop(x_bihw, conv.weight, conv.bias, stride, 1, groups)
    expected = LOOPS[family](adapter, y, x_bihw, stride, groups)
    assert torch.allclose(Adapted(conv, adapter, found)(x_bihw), expected, rtol=0, atol=1e-12)
    weight, bias = adapter.fold(conv.weight, conv.bias, (1, 1))
    folded = conv_loop(x_bihw, weight, bias, stride, 1, groups)
    assert torch.allclose(folded, expected, rtol=0, atol=1e-12)


# Dropout reaches the adapter's input and nothing else.


@pytest.mark.parametrize("kind", ["1x1", "linear bnf"])
@pytest.mark.parametrize("family", [ot.Parallel(dropout=0.5), ot.LowRank(rank=3, dropout=0.5)])
def test_dropout_acts_on_the_adapters_input_in_training_only(family: Family, kind: str) -> None:
    fresh = domain(one_layer(kind), Case(family))
    x_bihw = images(6, 4, 4, n=16)
    torch.manual_seed(9)
    fresh.layer.train()
    plain = one_layer(kind).requires_grad_(False)
    assert torch.equal(fresh.features(x_bihw), plain.features(x_bihw))  # A = 0
    model = shaken(fresh)
    logits = model.eval()(x_bihw)
    assert torch.equal(model(x_bihw), logits)
    model.layer.train()
    assert not torch.equal(model(x_bihw), logits)


@pytest.mark.parametrize(("kind", "whole_channels"), [("1x1", True), ("linear bnf", False)])
def test_dropout_takes_whole_channels_of_an_image_and_single_numbers_of_a_vector(
    kind: str, whole_channels: bool
) -> None:
    square = Site("s", "conv" if whole_channels else "linear", 5, 5)
    adapter = ot.Parallel(dropout=0.5).build(square)
    with torch.no_grad():
        adapter.a_oi.copy_(torch.eye(5))
    x = torch.ones((8, 5, 6, 6) if whole_channels else (8, 6, 6, 5))
    torch.manual_seed(10)
    kept = adapter.train()(x, torch.zeros_like(x))
    assert set(kept.unique().tolist()) == {0.0, 2.0}
    constant = (kept == kept[:, :, :1, :1]).all()
    assert bool(constant) == whole_channels
