"""relative_change: |w' - w| / |w| of the merged weights, by a naive computation."""

import pytest
import torch

import onetrunk as ot
from onetrunk.core.change import relative_change
from onetrunk.core.tree import own_tensors


def test_it_is_the_adapter_beside_the_bank_and_zero_elsewhere():
    net = ot.backbone("resnet26(width=0.125)", pretrained=False)
    where = ot.Where(stages="late")
    model = ot.attach(
        net, ot.Parallel(init="released"), ["a", "b"], where=where, input_size=(3, 32, 32)
    )
    changes = relative_change(model)
    assert len(changes) == 25
    for site, change in changes.items():
        layer = model.get_submodule(site)
        if site in model.domain.plan:
            added, bank = layer.adapter.a_oi.detach(), net.get_submodule(site).weight.detach()
            assert change == pytest.approx(float(added.norm() / bank.norm()), rel=1e-5)
        else:
            assert change == 0


def test_fine_tuning_changes_every_layer_by_what_was_added_to_it():
    net = ot.backbone("resnet26(width=0.125)", pretrained=False)
    model = ot.attach(net, ot.Full(), ["a", "b"], input_size=(3, 32, 32))
    with torch.no_grad():
        for site in relative_change(model):
            for tensor in own_tensors(model.get_submodule(site)):
                tensor.mul_(1.5)
    assert list(relative_change(model).values()) == pytest.approx([0.5] * 25)
