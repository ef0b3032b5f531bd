"""One kernel as a backend of LayerZero: a linear layer, the residual behind it and a relu, in one operator."""

import torch

from lz_compiler.backends.base import Kernel
from lz_compiler.trust.capabilities import fitting

library = torch.library.Library("my_backend", "DEF")
library.define("linear_add(Tensor x, Tensor w, Tensor bias, Tensor other) -> Tensor", tags=(torch.Tag.needs_exact_strides,))


def linear_add(x, w, bias, other):
    """x (M, K) w^T (K, N) + bias + other, (M, N). Here the call into your own library would stand."""
    return torch.addmm(bias, x, w.t()).add_(other.view(x.shape[0], w.shape[0]))


library.impl("linear_add", linear_add, "CPU")
torch.library.register_fake("my_backend::linear_add", lambda x, w, bias, other: x.new_empty((x.shape[0], w.shape[0])), lib=library)


def run(emit, tensors, params):
    """The kernel, written once: `emit` runs operators when the kernel is measured, and places them in the graph when it is chosen."""
    return emit.call(torch.ops.my_backend.linear_add.default, *(tensors[role] for role in ("x", "w", "bias", "other")))


class MyBackend:
    name, devices = "my_backend", ("cpu",)
    kernels = {"my_backend.linear_add": Kernel("my_backend.linear_add", run)}

    def version(self):
        return "0.1.0"  # of the library: timings and verdicts of another version are not used

    def missing(self):
        return None  # or why the library cannot be used here, without importing it

    def candidates(self, ctx):
        fit, refused = fitting(self, ctx)  # what my_backend.json allows
        yield from refused
        for name in fit:
            yield ctx.candidate(self.kernels[name])
