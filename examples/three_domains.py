"""Three domains on one backbone: memory is shared, and nothing one of them does reaches another.

python examples/three_domains.py        about 20 seconds
"""

import torch

import onetrunk as ot
from onetrunk.data import Preprocessing, load

backbone = ot.backbone("resnet26(width=0.25)")  # untrained: this is about sharing, not accuracy
preprocessing = Preprocessing.for_backbone(backbone, size_px=32)

sources = {"textures": "builtin:textures", "faces": "builtin:faces", "science": "builtin:science"}
splits = {name: load(source).with_validation() for name, source in sources.items()}
domains = {
    name: ot.attach(backbone, ot.Parallel(), part.classes, preprocessing=preprocessing).eval()
    for name, part in splits.items()
}

storages = {
    t.untyped_storage().data_ptr(): t.numel()
    for model in domains.values()
    for t in model.state_dict().values()
}
apart = sum(t.numel() for model in domains.values() for t in model.state_dict().values())
print(f"three domains hold {sum(storages.values()):,} numbers, not {apart:,}")

images_bchw = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    before = {name: model(images_bchw) for name, model in domains.items()}

faces = splits["faces"]
for step in ot.fit(domains["faces"], faces.train, ot.Recipe(epochs=3), val=faces.val):
    if step.val_accuracy is not None:
        print(f"epoch {step.epoch}: loss {step.loss:.2f}, validation {step.val_accuracy:.2f}")

with torch.no_grad():
    for name in ("textures", "science"):
        same = torch.equal(domains[name](images_bchw), before[name])
        print(f"{name}: logits the same, bit for bit: {same}")
        assert same
