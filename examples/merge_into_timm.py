"""A domain as an ordinary timm network: merged, saved, loaded where there is no onetrunk.

python examples/merge_into_timm.py        a few seconds
"""

import tempfile
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file

import onetrunk as ot

torch.manual_seed(0)
backbone = timm.create_model("test_resnet").eval()  # random weights: this is about exactness
model = ot.attach(backbone, ot.LowRank(rank=4), ["daisy", "rose", "tulip"])
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))

images_bchw = torch.randn(4, 3, 160, 160)
plain = ot.merge(model, check=images_bchw)  # adapters and batch norms folded in, and compared
print("norms left:", sum("norm" in type(m).__name__.lower() for m in plain.modules()))

stock = ot.merge(model, fold_norms=False, check=images_bchw)  # timm's own layers and names
with tempfile.TemporaryDirectory() as folder:
    file = Path(folder, "flowers.safetensors")
    save_file(stock.state_dict(), file)
    elsewhere = timm.create_model("test_resnet", num_classes=3).eval()
    elsewhere.load_state_dict(load_file(file))
    with torch.no_grad():
        y, again = model.eval()(images_bchw), elsewhere(images_bchw)
print(f"largest difference of the logits: {(y - again).abs().max():.1e}")
assert torch.allclose(y, again, atol=1e-4)
