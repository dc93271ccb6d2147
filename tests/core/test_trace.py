"""trace: what one dry run of a backbone shows, and what it refuses."""

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from onetrunk.backbones import resnet26
from onetrunk.core.trace import default_sizes, following_norms, trace
from onetrunk.errors import BackboneError


class Net(nn.Module):
    """Two convolutions called against the order of their names; `last` is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Conv2d(8, 8, 1)
        self.first = nn.Conv2d(3, 8, 3, 2, 1)
        self.unused = nn.Linear(8, 8)
        self.fc = nn.Linear(8, 5)

    def forward(self, x_bihw: Tensor) -> Tensor:
        y_bohw = self.last(self.last(self.first(x_bihw)))
        return self.fc(y_bohw.mean((2, 3)))


def classifier_of(net: nn.Module) -> tuple[str, ...]:
    return trace(net.eval()).head


def test_sites_come_in_the_order_of_execution_and_the_head_is_none_of_them() -> None:
    traced = trace(Net(), (3, 16, 16))
    assert [(site.name, site.order) for site in traced.sites] == [("first", 0), ("last", 1)]
    assert traced.head == ("fc",) and traced.head_features == 8


def test_positions_add_up_over_the_calls_of_one_layer() -> None:
    first, last = trace(Net(), (3, 16, 16)).sites
    assert (first.out_hw, first.positions) == ((8, 8), 64)
    assert (last.out_hw, last.positions) == ((8, 8), 128)
    assert last.multiply_adds == 128 * 64


def test_a_layer_that_is_not_called_is_listed_with_the_reason() -> None:
    assert trace(Net()).skipped == {"unused": "it is not called as a module in a forward pass"}


def test_the_backbone_is_left_as_it_was() -> None:
    net = Net().train()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    trace(net)
    assert net.training and all(p.requires_grad for p in net.parameters())
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_other_kinds_of_layer_with_weights_are_listed_with_their_kind() -> None:
    class Sequence(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))
            self.conv, self.mix = nn.Conv2d(3, 4, 1), nn.Conv1d(4, 4, 1)
            self.fc = nn.Linear(4, 2)

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.fc(self.scale * self.mix(self.conv(x_bihw).flatten(2)).mean(2))

    assert trace(Sequence()).skipped == {
        "scale": "a parameter of Sequence itself",
        "mix": "Conv1d with weight, bias is neither Conv2d nor Linear",
    }


def test_attention_that_reads_weights_directly_is_listed() -> None:
    net = torchvision.models.vision_transformer.VisionTransformer(32, 16, 1, 2, 8, 16)
    skipped = trace(net, (3, 32, 32)).skipped
    block = "encoder.layers.encoder_layer_0"
    assert skipped[f"{block}.self_attention.out_proj"].startswith("it is not called as a module")
    assert skipped[f"{block}.self_attention"].startswith("MultiheadAttention with in_proj_weight")


def test_stages_are_thirds_of_the_resolutions_else_of_the_depth() -> None:
    stages = {site.name: site.stage for site in trace(resnet26(0.25)).sites}
    assert stages["stem"] == stages["stages.0.0.conv1"] == "early"
    assert stages["stages.1.0.conv1"] == "mid" and stages["stages.2.3.conv2"] == "late"
    flat = nn.Sequential(*(nn.Conv2d(3, 3, 1, bias=False) for _ in range(6)))
    assert [s.stage for s in trace(flat).sites] == ["early"] * 2 + ["mid"] * 2 + ["late"] * 2


def test_layers_on_pooled_vectors_belong_to_the_resolution_around_them() -> None:
    traced = trace(timm.create_model("efficientnet_b0"), (3, 64, 64))
    stages = {site.name: site.stage for site in traced.sites}
    assert stages["blocks.0.0.se.conv_reduce"] == stages["blocks.0.0.conv_dw"] == "early"


@pytest.mark.parametrize(
    ("name", "options", "head"),
    [
        ("resnet18", {}, ("fc",)),
        ("resnet18", {"num_classes": 0}, ("fc",)),
        ("deit_tiny_distilled_patch16_224", {}, ("head", "head_dist")),
        ("levit_128s", {}, ("head.linear", "head_dist.linear")),
        ("crossvit_tiny_240", {}, ("head.0", "head.1")),
        ("resnetv2_50x1_bit", {}, ("head.fc",)),
        ("convnext_atto", {}, ("head.fc",)),
    ],
)
def test_timms_classifiers_are_found(
    name: str, options: dict[str, int], head: tuple[str, ...]
) -> None:
    assert classifier_of(timm.create_model(name, **options)) == head


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("densenet121", "classifier"),
        ("mobilenet_v3_small", "classifier.3"),
        ("convnext_tiny", "classifier.2"),
        ("squeezenet1_1", "classifier.1"),
        ("shufflenet_v2_x0_5", "fc"),
    ],
)
def test_torchvisions_classifiers_are_found(name: str, head: str) -> None:
    with torch.device("meta"):
        net = torchvision.models.get_model(name, weights=None)
    assert classifier_of(net) == (head,)


def test_an_identity_at_the_end_is_a_head_only_for_vectors() -> None:
    body = [nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    ending = trace(nn.Sequential(*body, nn.Identity()))
    assert ending.head == ("3",) and ending.head_features == 4
    assert trace(nn.Sequential(body[0], nn.Identity())).head == ()


@pytest.mark.parametrize("last", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 1, bias=False)])
def test_a_convolution_that_is_no_classifier_is_not_taken_for_one(last: nn.Module) -> None:
    assert classifier_of(nn.Sequential(last, nn.AdaptiveAvgPool2d(1), nn.Flatten())) == ()


def test_a_norm_after_the_last_layer_says_that_it_is_no_classifier() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1))
    assert classifier_of(nn.Sequential(*net, nn.Flatten())) == ()


def test_the_sizes_tried_are_the_backbones_own_else_common_ones() -> None:
    assert default_sizes(resnet26(0.25)) == [(3, 64, 64)]
    sides = (224, 64, 32, 28)
    assert default_sizes(nn.Sequential(nn.Conv2d(3, 2, 1))) == [(3, s, s) for s in sides]
    grey_first = [(1, s, s) for s in sides] + [(3, s, s) for s in sides]
    assert default_sizes(nn.Sequential(nn.Conv2d(1, 2, 1))) == grey_first


def test_a_backbone_that_runs_at_one_common_size_only_is_run_at_that() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.Flatten(), nn.Linear(4 * 16 * 16, 6))
    assert trace(net).input_size == (3, 32, 32)


def test_a_backbone_that_meta_cannot_run_runs_on_zeros() -> None:
    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(3, 2)

        def forward(self, x_bihw: Tensor) -> Tensor:
            y = self.fc(x_bihw.mean((2, 3)))
            return y if float(x_bihw.sum()) == 0.0 else -y

    assert trace(Asks()).head == ("fc",)


def test_a_size_that_does_not_run_is_refused_with_the_reason() -> None:
    with pytest.raises(BackboneError, match=r"Sequential does not run on one image of 3x5x5 \(.+"):
        trace(nn.Sequential(nn.Conv2d(3, 4, 7)), (3, 5, 5))
    with pytest.raises(BackboneError, match=r"one image of 3x224x224, 3x64x64.*input_size="):
        trace(nn.Sequential(nn.Flatten(), nn.Linear(7, 2)))


def test_an_unknown_head_is_refused_with_the_last_modules() -> None:
    with pytest.raises(BackboneError, match=r"head 'fcc': Net has no such module.*unused, fc"):
        trace(Net(), head="fcc")


def pair(*layers: nn.Module) -> dict[str, str]:
    net = nn.Sequential(*layers)
    return following_norms(net.eval(), {"0"}, (3, 8, 8))


def test_the_norm_that_alone_reads_a_layer_follows_it() -> None:
    assert pair(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)) == {"0": "1"}
    assert pair(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4)) == {}


def test_a_batch_norm_over_another_axis_than_the_channels_does_not_follow() -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 3), nn.BatchNorm1d(3)

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.norm(self.fc(x_bihw[:, :, 0]))

    assert following_norms(Tokens().eval(), {"fc"}, (3, 8, 8)) == {}


def test_an_output_that_others_see_keeps_its_norm() -> None:
    class Both(nn.Module):
        def __init__(self, returned: bool) -> None:
            super().__init__()
            self.returned = returned
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x_bihw: Tensor) -> object:
            y = self.conv(x_bihw)
            return {"y": [y], "z": self.norm(y)} if self.returned else self.norm(y) + y

    for returned in (False, True):
        assert following_norms(Both(returned).eval(), {"conv"}, (3, 8, 8)) == {}


def test_a_norm_with_a_forward_of_its_own_does_not_follow() -> None:
    class Doubled(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    assert pair(nn.Conv2d(3, 4, 1), Doubled(4)) == {}


def test_a_norm_without_statistics_or_called_twice_does_not_follow() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.norm(self.norm(self.conv(x_bihw)))

    assert pair(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False)) == {}
    assert following_norms(Twice().eval(), {"conv"}, (3, 8, 8)) == {}


def test_a_network_that_does_not_run_has_nothing_that_follows() -> None:
    net = nn.Sequential(nn.Conv2d(5, 4, 1), nn.BatchNorm2d(4))
    assert following_norms(net.eval(), {"0"}, (3, 8, 8)) == {}
