"""merge: what folds, what stays, what the check measures, and what is refused."""

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from timm.layers.conv2d_same import Conv2dSame
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import fingerprint, resnet26
from onetrunk.core.adapters import Family
from onetrunk.core.attach import attach
from onetrunk.core.domain import delta
from onetrunk.core.merge import difference, merge, model_in_eval
from onetrunk.errors import AttachError, MergeError

CLASSES = ["daisy", "rose", "tulip"]
TAIL = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))


def images(side: int = 32, channels: int = 3, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((2, channels, side, side), generator=generator).to(dtype)


@torch.no_grad()
def shaken(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, tensor in delta(model).items():
        if tensor.is_floating_point():
            drawn = 0.1 * torch.randn(tensor.shape, generator=generator)
            gain = name.endswith(("running_var", "weight")) and tensor.ndim == 1
            tensor.copy_(drawn.abs() + 0.9 if gain else drawn)
    return model.eval()


def domain(*layers: nn.Module, family: object = None, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return shaken(attach(nn.Sequential(*layers), family or ot.Parallel(), CLASSES, **options))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return shaken(attach(timm.create_model(name), ot.Parallel(), CLASSES))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def relative(model: nn.Module, merged: nn.Module, x_bihw: Tensor) -> float:
    with torch.no_grad():
        y = model(x_bihw)
        return float((merged(x_bihw) - y).abs().max() / y.abs().max())


# Which norms fold


def test_every_batch_norm_of_a_resnet_folds() -> None:
    model = make("resnet18")
    merged = merge(model)
    assert len(norms(model)) == 20 and not norms(merged)
    assert relative(model, merged, images(64)) <= 1e-5


def test_the_papers_network_keeps_only_the_norm_that_follows_a_sum() -> None:
    model = shaken(attach(resnet26(0.25), ot.Series(), CLASSES))
    merged = merge(model)
    assert [n for n, m in merged.named_modules() if m in norms(merged)] == ["norm"]
    assert relative(model, merged, images(64)) <= 1e-5


def test_pre_activation_networks_keep_the_norms_that_come_first() -> None:
    model = make("densenet121")
    merged = merge(model)
    assert 0 < len(norms(merged)) < len(norms(model))
    assert relative(model, merged, images(64)) <= 1e-4


def test_a_folded_norm_leaves_its_activation_and_drop_behind() -> None:
    norm = BatchNormAct2d(8, act_layer=nn.SiLU, drop_layer=nn.Dropout)
    model = domain(nn.Conv2d(3, 8, 3), norm, *TAIL)
    merged = merge(model)
    assert [type(m) for m in merged[1].modules()] == [nn.Sequential, nn.Dropout, nn.SiLU]
    assert relative(model, merged, images()) <= 1e-5
    alone = merge(domain(nn.Conv2d(3, 8, 3), BatchNormAct2d(8), *TAIL))
    assert type(alone[1]) is nn.ReLU
    plain = merge(domain(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), *TAIL))
    assert type(plain[1]) is nn.Identity


def test_a_linear_layer_takes_its_norm_along() -> None:
    body = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 8, bias=False), nn.BatchNorm1d(8))
    model = domain(*body, nn.ReLU(), nn.Linear(8, 2))
    merged = merge(model)
    assert not norms(merged) and merged[2].bias is not None
    assert relative(model, merged, images()) <= 1e-5


def test_a_norm_over_tokens_is_never_taken_for_one_over_channels() -> None:
    class Tokens(nn.Module):
        """Batch norm over 8 positions behind a linear layer with 8 features: the sizes agree."""

        def __init__(self) -> None:
            super().__init__()
            self.mix, self.norm, self.fc = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.fc(self.norm(self.mix(x_bihw[:, 0])).mean(1))

    model = shaken(attach(Tokens(), ot.Parallel(), CLASSES, input_size=(3, 8, 8)))
    merged = merge(model)
    assert len(norms(merged)) == 1 and relative(model, merged, images(8)) <= 1e-5


def test_a_convolution_with_a_forward_of_its_own_keeps_its_norm() -> None:
    class Loud(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = domain(nn.Conv2d(3, 8, 3), Loud(8, 8, 1), nn.BatchNorm2d(8), *TAIL)
    merged = merge(model)
    assert type(merged[1]) is Loud and len(norms(merged)) == 1
    assert relative(model, merged, images()) <= 1e-5


def test_norms_fold_at_the_size_that_attach_was_given() -> None:
    fixed = (nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 81, 2))
    assert not norms(merge(domain(*fixed, input_size=(2, 11, 11))))


def test_layers_that_pad_by_the_inputs_size_keep_timms_class_for_it() -> None:
    model = domain(Conv2dSame(3, 8, 3, 2), nn.BatchNorm2d(8), *TAIL)
    merged = merge(model)
    assert type(merged[0]) is Conv2dSame and not norms(merged)
    assert max(relative(model, merged, images(side)) for side in (31, 32)) <= 1e-5


# Without folding norms


@pytest.mark.parametrize("family", [ot.Series(), ot.Parallel(), ot.Channelwise()], ids=str)
@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "densenet121"])
def test_with_its_norms_kept_its_numbers_load_into_the_stock_architecture(
    name: str, family: Family
) -> None:
    torch.manual_seed(0)
    x_bihw = images(64, dtype=torch.float64)
    model = shaken(attach(timm.create_model(name).double(), family, CLASSES))
    merged = merge(model, fold_norms=False)
    assert relative(model, merged, x_bihw) <= 1e-10
    kept = {n for n, m in model.named_modules() if m in norms(model) and ".adapter." not in n}
    assert {n for n, m in merged.named_modules() if m in norms(merged)} == kept
    if name == "densenet121" and not isinstance(family, ot.Parallel):
        return  # its norms come before the layers: a bias has no norm to go into
    stock = timm.create_model(name, num_classes=3).double().eval()
    stock.load_state_dict(merged.state_dict())
    assert torch.equal(stock(x_bihw), merged(x_bihw))


# What a merged network is


def test_the_domain_and_the_backbone_stay_as_they_were() -> None:
    model = shaken(attach(resnet26(0.25), ot.Parallel(), CLASSES)).train()
    backbone = model.domain.backbone
    before, own = fingerprint(backbone), {n: t.clone() for n, t in delta(model).items()}
    merge(model)
    assert fingerprint(backbone) == before and model.training
    assert all(torch.equal(t, own[name]) for name, t in delta(model).items())


def test_a_merged_network_is_in_eval_mode_trains_again_and_resets_its_head() -> None:
    merged = merge(make("resnet18"))
    assert not any(m.training for m in merged.modules())
    assert all(p.requires_grad for p in merged.parameters())
    merged.reset_classifier(7)
    assert merged(images(64)).shape == (2, 7)


def test_a_merged_head_only_domain_is_the_backbone_with_another_head() -> None:
    model = shaken(attach(resnet26(0.25), ot.Head(), CLASSES))
    assert relative(model, merge(model), images(64)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_folding_keeps_the_layers_type_and_passes_its_own_check(dtype: torch.dtype) -> None:
    model = shaken(attach(resnet26(0.25).to(dtype), ot.Series(), CLASSES))
    merged = merge(model, check=images(64, dtype=dtype))
    assert {p.dtype for p in merged.parameters()} == {dtype}


# The check


def test_the_check_passes_where_merging_is_exact_also_for_a_domain_in_train_mode() -> None:
    model = make("resnet18").train()
    merge(model, check=images(64))
    merge(make("resnet18").double(), check=images(64))  # images come as the network takes them
    assert model.training


def test_the_difference_is_measured_against_the_networks_own_rounding() -> None:
    model = make("resnet18")
    found = difference(model, merge(model), images(64))
    assert 0 < found["noise"] < 1e-5
    assert found["difference"] <= found["limit"] <= 1e-4
    assert found["limit"] == pytest.approx(max(4 * found["noise"], 2e-6))


def test_a_network_that_computes_otherwise_in_its_forward_is_refused_by_the_check() -> None:
    class Sneaky(nn.Module):
        """Its forward looks at the layer's class, so the merged layer computes otherwise."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 2)

        def forward(self, x_bihw: Tensor) -> Tensor:
            factor = 1.0 if type(self.conv) is nn.Conv2d else 2.0
            return self.fc(factor * self.conv(x_bihw).mean((2, 3)))

    model = shaken(attach(Sneaky(), ot.Parallel(), CLASSES))
    merge(model)
    with pytest.raises(
        MergeError,
        match=r"merging changes the logits by \S+ of the largest, where \S+ is the limit "
        r"\(rounding noise \S+\)\. Use the domain's own network instead\.",
    ):
        merge(model, check=images())


def test_a_difference_in_a_single_number_is_beyond_the_limit() -> None:
    model = make("resnet18")
    merged = merge(model)
    with torch.no_grad():
        merged.fc.bias[0] += 1e-3
    found = difference(model, merged, images(64))
    assert found["difference"] > found["limit"]


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused_by_name(number: float) -> None:
    model = shaken(attach(resnet26(0.25), ot.Parallel(), CLASSES))
    with torch.no_grad():
        model.stem.adapter.a_oi[0, 0] = number
    with pytest.raises(MergeError, match=r"stem\.adapter\.a_oi holds NaN or infinity"):
        merge(model)


def test_what_is_no_domain_is_refused() -> None:
    with pytest.raises(AttachError, match="is no domain's network"):
        merge(resnet26(0.25))


def test_a_model_in_eval_mode_is_itself_and_another_a_copy_over_the_same_numbers() -> None:
    model = make("resnet18")
    assert model_in_eval(model) is model
    copied = model_in_eval(model.train())
    assert copied is not model and model.training and not copied.training
    assert copied.fc.weight.data_ptr() == model.fc.weight.data_ptr()
