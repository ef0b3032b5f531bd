"""Graph passes, in the order in which backend.py runs them: keep_attention (before AOTAutograd), drop_masks (on forward
and backward together), then apply and verify on the graph that AOTAutograd and Inductor's joint passes made."""
