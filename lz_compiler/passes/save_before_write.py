"""What reads an input that the graph writes into is saved for the backward pass, never computed again: AOTAutograd's partitioner
would read the new value then, and gradients would be wrong in silence (pytorch/pytorch#197039)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from ..capture import RESHAPES, VIEWS

aten = torch.ops.aten


def save_before_write_pass(graph: fx.Graph) -> int:
    """Mark the readers of written inputs in a graph of forward and backward together; returns how many."""
    nodes = graph.find_nodes(op="call_function", target=aten.copy_.default)
    readers = {reader for node in nodes if node.args[0].op == "placeholder" for reader in _readers(node.args[0]) if reader is not node}
    for reader in readers:
        reader.meta["recompute"] = CheckpointPolicy.MUST_SAVE
    return len(readers)


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What makes a new tensor of a node or a view of it: a view that is saved would show what is written later."""
    for user in node.users:
        if user.target in (*RESHAPES, *VIEWS):
            yield from _readers(user)
        else:
            yield user
