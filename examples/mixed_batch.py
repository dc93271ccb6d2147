"""Three domains behind one forward: each image of a batch gets its own domain's scores."""

import torch

import onetrunk as ot

CLASSES = {
    "flowers": ["daisy", "rose"],
    "signs": ["stop", "yield", "no entry"],
    "digits": list("0123456789"),
}

backbone = ot.backbone("resnet26(width=0.5)")
models = {
    name: ot.attach(backbone, ot.LowRank(4), classes, input_size=(3, 32, 32)).eval()
    for name, classes in CLASSES.items()
}  # in earnest: Bank.open("garden.bank").load(name)

images_bchw = torch.randn(4, 3, 32, 32)
mixed = ot.mix(models, check=images_bchw)
rows = ["signs", "flowers", "digits", "signs"]
for name, scores_c in zip(rows, mixed(images_bchw, rows), strict=True):
    best = int(scores_c.argmax())
    print(f"{name:8} {len(scores_c):2} scores, the highest for {mixed.classes(name)[best]!r}")

alone = models["digits"](images_bchw)[2].detach()
off = float((mixed(images_bchw, rows)[2] - alone).abs().max() / alone.abs().max())
print(f"a mixed row and its own domain's network differ by {off:.1e} of the largest score")
