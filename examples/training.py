"""Training: the forward and the backward graph are both planned. The same steps in eager give the same losses."""

import copy

import torch
import torch.nn.functional as F
from torch import nn

import lz_compiler as lz

STEPS = 8

torch.manual_seed(0)
layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True, norm_first=True)
model = nn.Sequential(nn.Embedding(64, 128), nn.TransformerEncoder(layer, 1, enable_nested_tensor=False), nn.Linear(128, 64))
ids = torch.randint(64, (8, 32))


def train(module, run):
    """The loss of each step, on one batch: predict each token from itself and the others."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    losses = []
    for _ in range(STEPS):
        loss = F.cross_entropy(run(ids).flatten(0, 1), ids.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


eager = train(twin := copy.deepcopy(model), twin)
compiled = torch.compile(model, backend="layerzero", options={"race": False})
losses = train(model, compiled)

print(lz.explain(compiled))
print("\nloss, LayerZero: ", *(f"{v:.3f}" for v in losses))
print("loss, eager:     ", *(f"{v:.3f}" for v in eager))
