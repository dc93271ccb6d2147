"""copy_tree: what is shared stays one tensor's memory, what is owned is a copy with its ties."""

import torch
from torch import Tensor, nn

from onetrunk.core.tree import copy_tree, storage_key


class Buffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        whole = torch.arange(6.0)
        self.register_buffer("alone", torch.arange(4.0))
        self.register_buffer("twin", torch.zeros(3))
        self.register_buffer("other_twin", self.twin.view(3))
        self.register_buffer("part", whole[2:4])
        self.register_buffer("told", torch.ones(2))
        self.told.reason = "kept"
        self.norm = nn.BatchNorm2d(2)


def buffers(module: nn.Module) -> dict[str, Tensor]:
    return dict(module.named_buffers())


def test_own_buffers_are_copies_and_the_others_share_memory():
    net = Buffers()
    own = [net.alone, net.norm.running_mean, net.norm.num_batches_tracked]
    copied, names = buffers(copy_tree(net, own)), {id(t): n for n, t in buffers(net).items()}
    owned = {names[id(t)] for t in own}
    for name, tensor in buffers(net).items():
        assert torch.equal(copied[name], tensor) and copied[name] is not tensor
        assert (storage_key(copied[name]) == storage_key(tensor)) == (name not in owned), name


def test_ties_views_and_attributes_of_own_buffers_survive():
    net = Buffers()
    copied = copy_tree(net, list(net.buffers()))
    copied.twin.fill_(7.0)
    assert copied.other_twin.tolist() == [7.0] * 3 and net.twin.tolist() == [0.0] * 3
    assert copied.part.tolist() == [2.0, 3.0] and copied.told.reason == "kept"
