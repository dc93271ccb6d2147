"""attach: what a domain's network keeps of its backbone, what is its own, and what is refused."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

import onetrunk as ot
from onetrunk.backbones import ResNet26, fingerprint, resnet26
from onetrunk.core.adapted import Adapted
from onetrunk.core.attach import attach, build
from onetrunk.core.domain import delta, delta_names, domain_of
from onetrunk.core.trace import trace
from onetrunk.core.tree import Frozen, frozen_pairs, storage_key
from onetrunk.data.preprocessing import Preprocessing
from onetrunk.errors import AttachError, BackboneError

CLASSES = ["daisy", "rose", "tulip"]


def images(side: int = 32, channels: int = 3, n: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn((n, channels, side, side), generator=generator)


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2),
    ).eval()  # fmt: skip


def make(name: str, **options: object) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **options).eval()


class WithIdentity(nn.Module):
    """A user's feature extractor that ends in an Identity."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(3, 8, 3, padding=1), nn.Identity()

    def forward(self, x_bihw: Tensor) -> Tensor:
        return self.out(self.conv(x_bihw).mean((2, 3)))


class WithoutHead(WithIdentity):
    def forward(self, x_bihw: Tensor) -> Tensor:
        return self.conv(x_bihw).mean((2, 3))


# What a domain is


def test_the_domain_is_of_the_backbones_own_class_and_says_what_it_is() -> None:
    backbone = resnet26(0.25)
    model = attach(backbone, ot.Parallel(), CLASSES)
    assert type(model) is type(backbone)
    domain = domain_of(model)
    assert domain.classes == tuple(CLASSES) and domain.family == "parallel"
    assert domain.scope == "adapters" and len(domain.plan) == 25 and not domain.skipped
    assert domain.head == ("fc",) and domain.backbone is backbone
    assert repr(domain) == "Domain(parallel, 25 sites, 3 classes)"


def test_the_backbone_stays_as_it_was() -> None:
    backbone = resnet26(0.25).train()
    before, modules = fingerprint(backbone), [type(m) for m in backbone.modules()]
    attach(backbone, ot.Parallel(), CLASSES)
    assert fingerprint(backbone) == before and backbone.training
    assert [type(m) for m in backbone.modules()] == modules
    assert all(p.requires_grad for p in backbone.parameters())


def test_only_adapters_norms_and_head_ask_for_gradients() -> None:
    model = attach(small(), ot.Parallel(), CLASSES)
    asking = {name for name, p in model.named_parameters() if p.requires_grad}
    assert asking == {"0.adapter.a_oi", "1.weight", "1.bias", "5.weight", "5.bias"}


def test_the_delta_is_everything_but_the_backbones_tensors() -> None:
    model = attach(small(), ot.Parallel(), CLASSES)
    own = ["0.adapter.a_oi", "1.weight", "1.bias", "1.running_mean", "1.running_var"]
    own += ["1.num_batches_tracked", "5.weight", "5.bias"]
    assert delta_names(model) == own == list(delta(model))
    assert domain_of(model).frozen == {"0.layer.weight", "0.layer.bias"}


def test_the_frozen_tensors_are_the_backbones_under_its_own_names() -> None:
    for family in (ot.Parallel(), ot.Head()):
        backbone = small()
        model = attach(backbone, family, CLASSES)
        pairs = list(frozen_pairs(model, backbone, domain_of(model).frozen))
        assert len(pairs) == len(domain_of(model).frozen)
        for ours, theirs, name in pairs:
            assert (
                storage_key(ours) == storage_key(theirs) == storage_key(backbone.state_dict()[name])
            )


def test_frozen_names_hold_below_a_wrapped_norm_with_an_activation_of_its_own() -> None:
    norm = BatchNormAct2d(8, act_layer=nn.PReLU)
    backbone = nn.Sequential(nn.Conv2d(3, 8, 1), norm, *list(small())[3:]).eval()
    model = attach(backbone, ot.Head(), CLASSES)
    names = {name for _, _, name in frozen_pairs(model, backbone, domain_of(model).frozen)}
    assert "1.act.weight" in names and names <= set(backbone.state_dict())


def test_a_layer_that_is_registered_twice_is_adapted_at_both_places() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.same, self.fc = self.conv, nn.Linear(8, 2)

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.fc(self.same(x_bihw).mean((2, 3)))

    model = attach(Twice(), ot.Parallel(), CLASSES)
    assert isinstance(model.conv, Adapted) and model.same is model.conv
    model(images()).sum().backward()
    assert model.conv.adapter.a_oi.grad.any()


def test_an_adapted_layer_still_answers_for_the_layer_it_holds() -> None:
    model = attach(small(), ot.Parallel(), CLASSES)
    assert isinstance(model[0], Adapted)
    assert model[0].out_channels == 8 and model[0].weight is model[0].layer.weight
    with pytest.raises(AttributeError, match="no_such_fact"):
        _ = model[0].no_such_fact


def test_a_deep_copy_of_a_domain_is_a_domain_with_tensors_of_its_own() -> None:
    model = attach(small(), ot.Parallel(), CLASSES)
    copied = copy.deepcopy(model)
    assert domain_of(copied) is domain_of(model)
    assert torch.equal(copied(images()), model(images()))
    theirs = {storage_key(t) for t in model.state_dict().values()}
    assert not theirs & {storage_key(t) for t in copied.state_dict().values()}


def test_built_again_from_its_record_and_its_delta_it_computes_the_same_bits() -> None:
    model = attach(make("efficientnet_b0"), None, CLASSES, input_size=(3, 64, 64)).eval()
    domain = domain_of(model)
    facts = {
        key: getattr(domain, key)
        for key in ("scope", "family", "plan", "skipped", "classes", "head", "head_features")
    }
    again = build(domain.backbone, **facts, preprocessing=domain.preprocessing, seed=99).eval()
    assert not torch.equal(again(images(64)), model(images(64)))
    again.load_state_dict(delta(model), strict=False)
    assert torch.equal(again(images(64)), model(images(64)))
    assert domain_of(again).frozen == domain.frozen


def test_preprocessing_is_the_backbones_own_unless_given() -> None:
    assert domain_of(attach(resnet26(0.25), ot.Head(), CLASSES)).preprocessing.size_px == 64
    given = Preprocessing(size_px=48)
    model = attach(resnet26(0.25), ot.Head(), CLASSES, preprocessing=given)
    assert domain_of(model).preprocessing is given


def test_images_are_prepared_for_the_size_that_the_backbone_was_run_at() -> None:
    by_default = attach(small(), ot.Head(), CLASSES)
    asked = attach(small(), ot.Head(), CLASSES, input_size=(3, 48, 48))
    assert domain_of(by_default).preprocessing.size_px == 224
    assert domain_of(asked).preprocessing.size_px == 48
    assert domain_of(asked).input_size == (3, 48, 48)


def test_a_backbone_of_other_than_one_or_three_channels_has_no_preprocessing() -> None:
    net = nn.Sequential(nn.Conv2d(7, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    model = attach(net, ot.Parallel(), CLASSES)
    assert domain_of(model).preprocessing is None
    assert model(images(8, channels=7)).shape == (2, 3)


def test_adapters_take_the_dtype_of_their_layer() -> None:
    model = attach(small().bfloat16(), ot.Series(), CLASSES)
    assert {t.dtype for t in model.state_dict().values()} == {torch.bfloat16, torch.int64}
    assert model.eval()(images().bfloat16()).dtype is torch.bfloat16


# timm's, torchvision's and users' networks


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("resnet18", 64),
        ("efficientnet_b0", 64),
        ("convnext_atto", 64),
        ("resnetv2_50x1_bit", 64),
        ("deit_tiny_distilled_patch16_224", 224),
        ("levit_128s", 224),
    ],
)
def test_timms_networks_keep_their_features_and_get_their_heads(name: str, side: int) -> None:
    backbone = make(name).requires_grad_(False)
    model = attach(backbone, None, CLASSES).eval()
    x_bihw = images(side)
    assert torch.equal(model.forward_features(x_bihw), backbone.forward_features(x_bihw))
    assert model(x_bihw).shape == (2, 3) and model.num_classes == 3
    heads = model.get_classifier()
    for head in heads if isinstance(heads, tuple) else (heads,):
        assert all(p.requires_grad for p in head.parameters())
    features = model.forward_features(x_bihw)
    assert torch.equal(model.forward_head(features), model(x_bihw))


def test_a_1x1_convolution_stays_the_kind_of_head_it_was() -> None:
    head = attach(make("resnetv2_50x1_bit"), ot.Head(), CLASSES).get_classifier()
    assert isinstance(head, nn.Conv2d) and head.out_channels == 3


def test_a_backbone_without_classes_gets_a_head() -> None:
    model = attach(make("resnet18", num_classes=0), ot.Head(), CLASSES)
    assert isinstance(model.fc, nn.Linear) and model(images()).shape == (2, 3)


def test_norms_with_an_activation_keep_their_activation_and_drop() -> None:
    backbone = make("efficientnet_b0", drop_rate=0.0)
    model = attach(backbone, ot.Parallel(), CLASSES, where=ot.Where(layers="all"))
    theirs = [m for m in backbone.modules() if isinstance(m, BatchNormAct2d)]
    ours = [m for m in model.modules() if isinstance(m, BatchNormAct2d)]
    assert len(ours) == len(theirs) > 0
    for own, shared in zip(ours, theirs, strict=True):
        assert type(own.act) is type(shared.act) and type(own.drop) is type(shared.drop)
        assert storage_key(own.running_mean) != storage_key(shared.running_mean)


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("resnet18", "fc"),
        ("vgg11", "classifier.6"),
        ("densenet121", "classifier"),
        ("mobilenet_v3_small", "classifier.3"),
        ("convnext_tiny", "classifier.2"),
        ("squeezenet1_1", "classifier.1"),
        ("vit_b_16", "heads.head"),
    ],
)
def test_torchvisions_networks_get_their_heads(name: str, head: str) -> None:
    torch.manual_seed(0)
    backbone = torchvision.models.get_model(name, weights=None, num_classes=9).eval()
    model = attach(backbone, None, CLASSES).eval()
    assert domain_of(model).head == (head,)
    side = 224 if name == "vit_b_16" else 64
    with torch.no_grad():
        assert model(images(side, n=1)).shape == (1, 3)
    own = {name.rpartition(".")[0] for name in delta(model)}
    assert head in own


def test_a_users_network_is_attached_by_its_last_linear_layer_or_the_named_head() -> None:
    by_itself = attach(small(), ot.Parallel(), CLASSES)
    named = attach(small(), ot.Parallel(), CLASSES, head="5")
    assert domain_of(by_itself).head == domain_of(named).head == ("5",)


def test_a_users_network_that_ends_in_an_identity_gets_a_linear_head() -> None:
    for options in ({}, {"head": "out"}):
        model = attach(WithIdentity(), ot.Parallel(), CLASSES, **options)
        assert isinstance(model.out, nn.Linear) and model.out.in_features == 8
        assert model(images()).shape == (2, 3)


# Head only


def test_head_only_keeps_the_backbones_statistics_in_train_mode() -> None:
    backbone = small()
    model = attach(backbone, ot.Head(), CLASSES).train()
    before = fingerprint(backbone)
    features = model[:5](images())
    assert torch.equal(features, backbone[:5](images()))
    assert fingerprint(backbone) == before
    assert isinstance(model[1], Frozen) and not model[1].layer.training
    assert delta_names(model) == ["5.weight", "5.bias"]


def test_head_only_trains_the_norms_that_come_with_a_fresh_head() -> None:
    model = attach(make("levit_128s"), ot.Head(), CLASSES).train()
    assert not isinstance(model.head.bn, Frozen)
    assert {name.partition(".")[0] for name in delta(model)} == {"head", "head_dist"}


def test_a_reset_that_wakes_shared_parameters_is_put_back_to_sleep() -> None:
    model = attach(make("efficientvim_m1"), ot.Parallel(), CLASSES, input_size=(3, 64, 64))
    frozen = domain_of(model).frozen
    awake = [n for n, p in model.named_parameters() if n in frozen and p.requires_grad]
    assert not awake and "weights" in frozen


def test_maps_of_one_pixel_keep_their_layout_so_that_features_keep_their_bits() -> None:
    backbone = make("efficientvim_m1").requires_grad_(False)
    everywhere = ot.Where(layers="all")
    for family in (ot.Series(), ot.Parallel(), ot.Channelwise()):
        model = attach(backbone, family, CLASSES, where=everywhere, input_size=(3, 64, 64)).eval()
        ours, theirs = (n.forward_features(images(64)) for n in (model, backbone))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


# Seeds and threads


def networks() -> list[nn.Module]:
    vision = torchvision.models.resnet18(weights=None).eval()
    return [small(), WithIdentity(), vision, make("resnet18"), make("levit_128s")]


def test_the_global_generator_is_not_touched_by_any_kind_of_head() -> None:
    for backbone in networks():
        state = torch.random.get_rng_state()
        attach(backbone, ot.Parallel(init="released"), CLASSES)
        assert torch.equal(torch.random.get_rng_state(), state), type(backbone).__name__


def test_heads_start_small_with_zero_bias_and_fresh_norms_neutral() -> None:
    model = attach(make("levit_128s"), ot.Head(), CLASSES)
    head = model.head
    assert head.linear.weight.std().item() == pytest.approx(0.01, rel=0.1)
    assert not head.linear.bias.any()
    assert (head.bn.weight == 1).all() and (head.bn.running_var == 1).all()


def test_threads_attach_one_backbone_at_once_and_get_what_one_would() -> None:
    backbone = make("resnet18")
    expected = delta(attach(backbone, ot.Parallel(init="released"), CLASSES, seed=7))
    state = torch.random.get_rng_state()
    drawn = torch.rand(64)

    def attached(k: int) -> bool:
        time.sleep(k % 5 * 0.002)
        model = attach(backbone, ot.Parallel(init="released"), CLASSES, seed=7)
        return all(torch.equal(t, expected[name]) for name, t in delta(model).items())

    before = fingerprint(backbone)
    torch.random.set_rng_state(state)
    with ThreadPoolExecutor(8) as pool:
        results = pool.map(attached, range(24))
        meanwhile = torch.cat([torch.rand(1) for _ in range(64)])
        assert all(results)
    assert torch.equal(meanwhile, drawn)  # nobody drew from, or put back, the global generator
    assert fingerprint(backbone) == before


# What is refused


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ("daisy", r"classes='daisy': give a list of names"),
        ([1, 2], r"classes=\[1, 2\]: give a list of names"),
        (3, r"classes=3: give a list of names"),
        ([], r"classes=\[\]: a domain needs at least two classes\."),
        (["daisy"], r"classes=\['daisy'\]: a domain needs at least two classes\."),
        (["a", "b", "a"], r"classes: 'a' is there twice; every class needs its own name\."),
    ],
)
def test_class_lists_that_are_none_are_refused(classes: object, message: str) -> None:
    with pytest.raises(AttachError, match=message):
        attach(small(), ot.Head(), classes)


def test_attaching_to_a_domain_is_refused() -> None:
    with pytest.raises(AttachError, match=r"domain's network already; attach to its backbone"):
        attach(attach(small(), ot.Head(), CLASSES), ot.Head(), CLASSES)


def test_what_is_no_family_is_refused() -> None:
    with pytest.raises(AttachError, match=r"family='parallel': give a family such as Parallel\(\)"):
        attach(small(), "parallel", CLASSES)


def test_a_placement_beside_a_plan_or_a_family_without_places_is_refused() -> None:
    with pytest.raises(AttachError, match="a plan names its sites itself: leave `where` out"):
        attach(small(), {"0": ot.Parallel()}, CLASSES, where=ot.Where())
    for family in (ot.Norm(), ot.Head()):
        with pytest.raises(AttachError, match=r"is placed at no layer: leave `where` out"):
            attach(small(), family, CLASSES, where=ot.Where())


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"9": ot.Parallel()}, r"puts parallel at '9': the backbone has no layer of that name\."),
        ({"2": ot.Parallel()}, r"puts parallel at '2': it is neither Conv2d nor Linear\."),
        ({"0": ot.LowRank(rank=9)}, r"lowrank\(rank=9\) at 0: 3 channels in, 8 out, 1 group"),
    ],
)
def test_a_plan_for_another_backbone_is_refused(plan: dict[str, object], message: str) -> None:
    with pytest.raises(AttachError, match=message):
        attach(small(), plan, CLASSES)


def test_a_plan_may_mix_families_and_writes_them_all() -> None:
    plan = {"stem": ot.Series(), "stages.0.0.conv1": ot.LowRank(rank=2)}
    domain = domain_of(attach(resnet26(0.25), plan, CLASSES))
    assert domain.family == "lowrank(rank=2) + series" and domain.plan == plan
    assert domain_of(attach(small(), {}, CLASSES)).family == "norm"


def test_a_backbone_without_a_classifier_is_refused_with_what_to_name() -> None:
    with pytest.raises(
        BackboneError, match=r"WithoutHead shows no classifier to replace.*head='fc' \(an nn\.Id"
    ):
        attach(WithoutHead(), ot.Parallel(), CLASSES)


def test_a_head_that_is_no_classifier_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"head is a convolution of kernel \(3, 3\) in 1 group"):
        attach(small(), ot.Head(), CLASSES, head="0")

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.unused = nn.Conv2d(3, 4, 1), nn.Identity()

        def forward(self, x_bihw: Tensor) -> Tensor:
            return self.conv(x_bihw)

    with pytest.raises(BackboneError, match="head Identity takes an unknown number of features"):
        attach(Maps(), ot.Norm(), CLASSES, head="unused")


def test_a_classifier_whose_fresh_numbers_are_unknown_is_refused() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.temperature = nn.Parameter(torch.ones(1))

    class WithOddHead(ResNet26):
        def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
            self.fc = Odd()

    backbone = WithOddHead(0.25)
    with pytest.raises(BackboneError, match=r"makes a Odd with each new classifier.*head='fc'"):
        attach(backbone, ot.Head(), CLASSES)


def test_an_unknown_head_or_size_is_refused() -> None:
    with pytest.raises(BackboneError, match=r"head 'fc': Sequential has no such module"):
        attach(small(), ot.Head(), CLASSES, head="fc")
    with pytest.raises(BackboneError, match=r"does not run on one image of 4x8x8.*input_size="):
        attach(small(), ot.Head(), CLASSES, input_size=(4, 8, 8))


def test_resetting_a_domains_classifier_is_refused() -> None:
    model = attach(make("resnet18"), ot.Parallel(), CLASSES)
    with pytest.raises(
        AttachError, match=r"reset_classifier would break this domain.*merge\(model"
    ):
        model.reset_classifier(10)
    make("resnet18").reset_classifier(10)


def test_what_is_no_domain_has_no_record() -> None:
    with pytest.raises(
        AttachError, match=r"Sequential is no domain's network.*load it from a bank"
    ):
        domain_of(small())


def test_loading_another_backbones_numbers_into_a_domain_is_refused() -> None:
    backbone = small()
    model = attach(backbone, ot.Parallel(), CLASSES)
    state = {name: t.clone() for name, t in model.state_dict().items()}
    model.load_state_dict(state)  # the same numbers are welcome
    before, own = fingerprint(backbone), delta(model)["0.adapter.a_oi"].clone()
    other = {**state, "0.layer.weight": state["0.layer.weight"] + 1, "0.adapter.a_oi": own + 1}
    with pytest.raises(AttachError, match=r"'0\.layer\.weight' is the backbone's.*every domain"):
        model.load_state_dict(other)
    assert fingerprint(backbone) == before
    assert torch.equal(delta(model)["0.adapter.a_oi"], own)
    nn.ModuleDict({"inside": copy.deepcopy(model)}).load_state_dict(
        {f"inside.{name}": t for name, t in state.items()}
    )


def test_attaching_resnet50_stays_fast() -> None:
    backbone = make("resnet50")
    attach(backbone, ot.Parallel(), CLASSES)
    spent = []
    for _ in range(5):
        start = time.thread_time()
        attach(backbone, ot.Parallel(), CLASSES)
        spent.append(time.thread_time() - start)
    assert min(spent) < 0.2  # 0.05 s here; the bound is for slower machines


def test_the_dry_run_does_not_run_the_backbone_itself() -> None:
    class Counting(WithIdentity):
        calls = 0

        def forward(self, x_bihw: Tensor) -> Tensor:
            assert x_bihw.is_meta, "the dry run computes shapes, not numbers"
            return super().forward(x_bihw)

    assert len(trace(Counting()).sites) == 1


@pytest.mark.parametrize(
    ("backbone", "options", "message"),
    [
        ("resnet26(width=0.125)", {}, r"a backbone is a module: onetrunk\.backbone\(NAME\)"),
        (None, {"family": {"stem": "series"}}, "the text 'series': read each with read_family"),
        (None, {"input_size": 32}, r"input_size=32: give channels, .* \(3, 32, 32\)"),
    ],
)
def test_natural_mistakes_are_told_the_way(backbone, options, message):
    with pytest.raises(AttachError, match=message):
        ot.attach(backbone or resnet26(width=0.125), classes=["a", "b"], **options)
