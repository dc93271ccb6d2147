"""align: V turned to where the images' gradients are, and what it leaves alone."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.core.align import align, unaligned
from onetrunk.core.attach import delta
from onetrunk.errors import AttachError

SMOOTHING = 0.1
N_IMAGES = 6


class OverTokens(nn.Module):
    """Convolutions, strided and grouped, then linear layers over pixels and over their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1)
        self.strided = nn.Conv2d(12, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 16, 1, groups=2)
        self.tokens = nn.Linear(16, 10)
        self.pooled = nn.Linear(10, 9)
        self.head = nn.Linear(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.grouped(F.gelu(self.strided(F.relu(self.stem(x))))))
        x = F.gelu(self.tokens(x.permute(0, 2, 3, 1)))
        return self.head(F.relu(self.pooled(x.mean((1, 2)))))


def domain(init: str = "aligned", rank: int = 2, where: ot.Where | None = None) -> nn.Module:
    torch.manual_seed(0)
    where = where or ot.Where(layers="all")
    family = ot.LowRank(rank, init=init)  # type: ignore[arg-type]
    return ot.attach(OverTokens(), family, ["a", "b"], where=where, input_size=(3, 6, 6))


def batches(n: int = N_IMAGES) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    x_bchw, labels_b = torch.randn(n, 3, 6, 6, generator=generator), torch.arange(n) % 2
    yield x_bchw[:4], labels_b[:4]
    if n > 4:
        yield x_bchw[4:], labels_b[4:]


def energy_by_loops(model: nn.Module, name: str) -> Tensor:
    """sum_b G_b' G_b, group by group, with G_b from autograd through a matrix beside the layer."""
    adapted = model.get_submodule(name)
    site, v_ri = adapted.adapter.site, adapted.adapter.v_ri.detach().clone()
    i = site.cin // site.groups
    energy_gii = torch.zeros(site.groups, i, i)
    with torch.no_grad():  # U = 0 and V = 1, so that dL/dU is dL/dA
        adapted.adapter.v_ri = nn.Parameter(torch.eye(i).repeat(site.groups, 1))
    u_before = adapted.adapter.u_or
    for x_bchw, labels_b in batches():
        for x_chw, label in zip(x_bchw, labels_b, strict=True):
            adapted.adapter.u_or = nn.Parameter(torch.zeros(site.cout, i))
            loss = F.cross_entropy(model(x_chw[None]), label[None], label_smoothing=SMOOTHING)
            loss.backward()
            for g, g_oi in enumerate(adapted.adapter.u_or.grad.unflatten(0, (site.groups, -1))):
                energy_gii[g] += g_oi.T @ g_oi
    adapted.adapter.v_ri, adapted.adapter.u_or = nn.Parameter(v_ri), u_before
    return energy_gii


@pytest.mark.parametrize("name", ["stem", "strided", "grouped", "tokens", "pooled"])
def test_the_rows_of_v_are_the_directions_of_most_energy_of_single_images(name: str) -> None:
    model = domain().eval()
    energy_gii = energy_by_loops(model, name)
    align(model, batches(), SMOOTHING)
    adapter = model.get_submodule(name).adapter
    for v_ri, energy_ii in zip(
        adapter.v_ri.detach().unflatten(0, (len(energy_gii), -1)), energy_gii, strict=True
    ):
        most_r = torch.linalg.eigvalsh(energy_ii).flip(0)[:2]
        torch.testing.assert_close(v_ri @ v_ri.T, torch.eye(2), rtol=0, atol=1e-5)
        found_r = ((v_ri @ energy_ii) * v_ri).sum(1)
        torch.testing.assert_close(found_r, most_r, rtol=1e-3, atol=1e-9)


def test_the_network_computes_what_it_did_and_only_v_changes() -> None:
    model, untouched = domain().eval(), domain()
    x_bchw = next(batches())[0]
    before = model(x_bchw)
    align(model, batches(), SMOOTHING)
    assert torch.equal(model(x_bchw), before)
    changed = {n for n, t in delta(untouched).items() if not torch.equal(t, delta(model)[n])}
    assert changed == {n for n in delta(model) if n.endswith("v_ri")}
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_images_give_the_same_bits_and_signs() -> None:
    found = [domain(), domain()]
    for model in (*found, found[1]):  # the second one twice, as where a resume does it again
        align(model, batches(), SMOOTHING)
    for name, tensor in delta(found[0]).items():
        assert torch.equal(tensor, delta(found[1])[name])
        if name.endswith("v_ri"):
            assert (tensor.gather(1, tensor.abs().argmax(1, keepdim=True)) > 0).all()


def test_rows_for_which_there_is_no_direction_stay() -> None:
    model = domain(rank=3, where=ot.Where(pattern="pooled", layers="all"))
    adapter = model.pooled.adapter
    before_ri = adapter.v_ri.detach().clone()
    align(model, batches(1), SMOOTHING)  # one image's G at one position has rank 1
    assert not torch.equal(adapter.v_ri[0], before_ri[0])
    assert torch.equal(adapter.v_ri[1:], before_ri[1:])


def test_adapters_that_did_not_ask_and_those_that_have_begun_are_left_alone() -> None:
    assert unaligned(domain("identity")) == {} == unaligned(domain("released"))
    model = domain()
    with torch.no_grad():
        model.stem.adapter.u_or[0, 0] = 1.0
    assert list(unaligned(model)) == ["strided", "grouped", "tokens", "pooled"]
    before_ri = model.stem.adapter.v_ri.detach().clone()
    align(model, batches(), SMOOTHING)
    assert torch.equal(model.stem.adapter.v_ri, before_ri)


def test_a_gradient_that_is_not_finite_is_told_and_changes_nothing() -> None:
    model, untouched = domain(), domain()
    broken = [(torch.full((2, 3, 6, 6), float("nan")), torch.tensor([0, 1]))]
    with pytest.raises(AttachError, match=r"the gradient at stem is not finite \(NaN or infinity"):
        align(model, broken)
    assert all(torch.equal(t, delta(untouched)[name]) for name, t in delta(model).items())
