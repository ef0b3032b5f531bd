"""Graph passes, in the order in which backend.py runs them: keep_attention (before AOTAutograd), then apply and verify on
the graph that AOTAutograd and Inductor's joint passes made."""
