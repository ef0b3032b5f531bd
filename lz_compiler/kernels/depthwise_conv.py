"""Depthwise 2-d convolution (groups == channels) of channels-last images, of odd kernel sizes such as ConvNeXt's 7 x 7.

A thread owns a few neighbouring channels and `block_w` outputs side by side in one image row. It loads each input of the
kernel_h x (block_w + kernel_w - 1) window once, widens it once to float32, and adds it to every output that it touches: the
arithmetic is the convolution's own multiplications and little else. The rows of all images form one list, so that no
program is left half empty by a small image.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch.library import triton_op, wrap_triton


@triton.jit
def _depthwise_conv_kernel(
    x, taps, bias, y, x_image, x_row, x_col,
    ROWS, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OUT_H: tl.constexpr, OUT_W: tl.constexpr,
    KERNEL_H: tl.constexpr, KERNEL_W: tl.constexpr, STRIDE: tl.constexpr, PAD_H: tl.constexpr, PAD_W: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    rows = tl.program_id(2) * BLOCK_H + tl.arange(0, BLOCK_H)
    left = tl.program_id(1) * BLOCK_W
    in_rows = (rows // OUT_H).to(tl.int64) * x_image
    top = rows % OUT_H * STRIDE - PAD_H
    first = tl.zeros((BLOCK_H, BLOCK_C), tl.float32)
    if bias is not None:
        first += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    acc = ()
    for _ in tl.static_range(BLOCK_W):
        acc += (first,)
    for i in range(KERNEL_H):
        h = top + i
        inside = ((rows < ROWS) & (h >= 0) & (h < H))[:, None] & (c < C)[None, :]
        line = x + (in_rows + h * x_row)[:, None] + c[None, :]
        weights = ()
        for j in tl.static_range(KERNEL_W):
            weights += (tl.load(taps + (i * KERNEL_W + j) * C + c, mask=c < C, other=0.0),)
        for col in tl.static_range((BLOCK_W - 1) * STRIDE + KERNEL_W):
            w = left * STRIDE + col - PAD_W
            v = tl.load(line + w * x_col, mask=inside & (w >= 0) & (w < W), other=0.0).to(tl.float32)
            new = ()
            for t in tl.static_range(BLOCK_W):
                if col - t * STRIDE >= 0 and col - t * STRIDE < KERNEL_W:
                    new += (acc[t] + v * weights[col - t * STRIDE][None, :],)
                else:
                    new += (acc[t],)
            acc = new
    mask = (rows < ROWS)[:, None] & (c < C)[None, :]
    out = y + rows.to(tl.int64)[:, None] * (OUT_W * C) + c[None, :]
    for t in tl.static_range(BLOCK_W):
        tl.store(out + (left + t) * C, acc[t].to(y.dtype.element_ty), mask=mask & (left + t < OUT_W))


@triton_op("lz::depthwise_conv", mutates_args={})
def depthwise_conv(
    x: torch.Tensor,
    w: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    *,
    block_h: int = 8,
    block_w: int = 7,
    block_c: int = 64,
    warps: int = 4,
) -> torch.Tensor:
    """conv2d(x, w, bias, stride, padding, groups=C) with float32 sums, for x (N, C, H, W) bf16, fp16 or float32 with channel stride 1.

    w (C, 1, kernel_h, kernel_w), any strides; bias (C,) contiguous. Returns (N, C, H', W'), channels_last, of x's dtype.
    A program computes `block_h` rows (of whichever image) x `block_w` columns x `block_c` channels; `block_h` and `block_c` are
    powers of two, `block_w` best divides W'.
    """
    images, channels, height, width = x.shape
    kernel_h, kernel_w = w.shape[2:]
    assert w.shape[:2] == (channels, 1), (x.shape, w.shape)
    assert x.stride(1) == 1, x.stride()
    out_h = (height + 2 * padding - kernel_h) // stride + 1
    out_w = (width + 2 * padding - kernel_w) // stride + 1
    # Channels side by side, as threads read them; frozen weights let Inductor do this once.
    taps = w.flatten(1).t().float().contiguous()
    y = torch.empty((images, out_h, out_w, channels), dtype=x.dtype, device=x.device)
    rows = images * out_h
    grid = (triton.cdiv(channels, block_c), triton.cdiv(out_w, block_w), triton.cdiv(rows, block_h))
    shapes = {"C": channels, "H": height, "W": width, "OUT_H": out_h, "OUT_W": out_w, "KERNEL_H": kernel_h, "KERNEL_W": kernel_w}
    shapes |= {"STRIDE": stride, "PAD_H": padding, "PAD_W": padding, "BLOCK_H": block_h, "BLOCK_W": block_w, "BLOCK_C": block_c}
    strides = (x.stride(0), x.stride(2), x.stride(3))
    wrap_triton(_depthwise_conv_kernel)[grid](x, taps, bias, y, *strides, rows, **shapes, num_warps=warps)
    return y.permute(0, 3, 1, 2)


def variants(out_w: int, stride: int) -> list[dict[str, Any]]:
    """Keyword arguments of `depthwise_conv` worth measuring for images of `out_w` output columns: what won, or lost by at most 3 %, in the
    14 regions of the H200's corpus (7 x 7 of ConvNeXt, 3 x 3 of MobileNetV2). Triton compiles each for seconds."""
    narrow = {"block_h": 8, "block_w": 4, "block_c": 64, "warps": 4}
    tall = {"block_h": 16, "block_w": 7, "block_c": 32, "warps": 4}
    wide = {"block_h": 8, "block_w": 14, "block_c": 64, "warps": 4}
    return [tall if stride == 1 else narrow, *([wide] if out_w > 7 else [])]
