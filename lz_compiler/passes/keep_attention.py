"""Keep attention whole. AOTAutograd would resolve scaled_dot_product_attention to one vendor's operator by a static rule;
as an operator of our own it reaches the planner with the choice still open."""

from __future__ import annotations

import torch
from torch import fx
from torch.nn import functional as F

from .. import ops, torch_private

ATTENTION = (F.scaled_dot_product_attention, torch.ops.aten.scaled_dot_product_attention.default)  # Dynamo's, torch.export's
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
DEFAULTS = {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}


def keep_attention_pass(gm: fx.GraphModule) -> fx.GraphModule:
    """Replace calls of scaled_dot_product_attention where no gradient flows and nothing is dropped out."""
    if torch.is_grad_enabled() or torch_private.autocasts(gm):
        # Forward and backward of one attention are one choice, and stay ATen's; autocast knows ATen's name only.
        return gm
    for node in list(gm.graph.nodes):
        if node.op != "call_function" or node.target not in ATTENTION:
            continue
        args = {**DEFAULTS, **dict(zip(NAMES, node.args, strict=False)), **node.kwargs}
        if args["dropout_p"] != 0.0 or not isinstance(args["is_causal"], bool) or set(args) != set(NAMES):
            continue
        operands = [args[n] for n in ("query", "key", "value", "attn_mask")]
        if any(_unusual(n) for n in operands):
            continue
        with gm.graph.inserting_before(node):
            whole = gm.graph.call_function(ops.sdpa, (*operands, args["is_causal"], args["scale"], args["enable_gqa"]))
        whole.meta = dict(node.meta)
        node.replace_all_uses_with(whole)
        gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _unusual(node: object) -> bool:
    """Nested or subclassed tensors dispatch on their own rules."""
    value = node.meta.get("example_value") if isinstance(node, fx.Node) else None
    return value is not None and (getattr(value, "is_nested", False) or value.layout is not torch.strided)
