"""LayerZero's own Triton kernels, each a torch operator of the namespace `lz` that TorchInductor inlines (`triton_op`).

Nothing here plans, and nothing here is imported with `lz_compiler`: the modules need triton, so a caller imports them when it
wants their operators. A launch depends on shapes and strides alone, never on the values of a tensor, so all of them can be
captured in a CUDA graph.
"""
