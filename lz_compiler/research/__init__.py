"""Cost models and solvers as an experiment: a corpus of problems with their timings, and the ablation over them."""
