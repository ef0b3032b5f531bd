"""A kernel of your own in 30 lines: an operator, what it is for, and it competes with all others.

A package registers its backend by an entry point instead: examples/my_backend.
"""

import torch

import lz_compiler as lz
from lz_compiler.backends import register
from lz_compiler.backends.base import Kernel

library = torch.library.Library("mine", "DEF")
library.define("linear_relu(Tensor x, Tensor w, Tensor bias) -> Tensor", tags=(torch.Tag.needs_exact_strides,))
library.impl("linear_relu", lambda x, w, bias: torch.addmm(bias, x, w.t()).relu_(), "CPU")  # here your library is called
torch.library.register_fake("mine::linear_relu", lambda x, w, bias: x.new_empty(x.shape[0], w.shape[0]), lib=library)


def linear_relu(emit, tensors, params):
    """Runs the operator when the kernel is measured, places it in the graph when it is chosen."""
    return emit.call(torch.ops.mine.linear_relu.default, tensors["x"], tensors["w"], tensors["bias"])


class Mine:
    name, devices = "mine", ("cpu",)
    kernels = {"mine.linear_relu": Kernel("mine.linear_relu", linear_relu)}

    def version(self):
        return "1"  # timings of another version are not used

    def missing(self):
        return None  # or why it cannot be used here

    def candidates(self, ctx):
        fits = ctx.region.op == "linear" and ctx.roles == ("x", "w", "bias") and not ctx.params["transposed"]
        if fits and ctx.params["act"] == "relu" and ctx.specs[0].dtype == "float32":
            yield ctx.candidate(self.kernels["mine.linear_relu"])


register(Mine())

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(256, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
x = torch.randn(64, 256)
# Chosen where it is the fastest; locked here, so that the example ends the same way on every machine.
policy = {"lock": [{"op": "linear", "out_features": 256, "kernel": "mine.linear_relu"}]}
with torch.no_grad():
    compiled = torch.compile(model, backend="layerzero", options={"race": False, "policy": policy})
    difference = (compiled(x) - model(x)).abs().max()

print(lz.explain(compiled))
print(f"\nlargest difference from eager: {difference:.1e}")
