"""A vision model of timm: convolutions, their layouts, and what is folded into them. Random weights, no download.

timm needs torchvision, of the same build as torch. Where it is not installed, the same network comes from transformers.
"""

import torch

import lz_compiler as lz

try:
    import timm
except ModuleNotFoundError:
    timm = None

torch.manual_seed(0)
if timm:
    model = timm.create_model("resnet10t", pretrained=False, num_classes=10)
else:
    from transformers import ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(
        ResNetConfig(depths=[1, 1, 1, 1], layer_type="basic", hidden_sizes=[64, 128, 256, 512], num_labels=10)
    )
model = model.eval()
images = torch.randn(2, 3, 96, 96)

compiled = torch.compile(model, backend="layerzero", options={"freeze": True, "race": False})
with torch.no_grad():
    expected, found = (getattr(y, "logits", y) for y in (model(images), compiled(images)))

print(lz.explain(compiled))
print(f"\n{type(model).__name__} of {type(model).__module__.partition('.')[0]}")
print(f"largest difference from eager: {(found - expected).abs().max():.1e}")
print(f"classes equal eager's: {torch.equal(found.argmax(-1), expected.argmax(-1))}")
