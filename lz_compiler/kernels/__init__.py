"""LayerZero's own Triton kernels, each a torch operator that Inductor inlines. Imported only where Triton is."""
