"""A Gaussian process over how far kernels are from their estimates: what one measurement says of the kernels not yet measured.

The residual of kernel i is y_i = ln(measured / estimate). Before anything is measured y has mean 0 and the covariance

    K_ij = s_i s_j (DEVICE + KERNEL [same kernel] + (SHAPE + BOTH [same kernel]) exp(-d_ij / LENGTH)),

a sum of what all kernels of this device have in common, what one kernel has at all sizes, what one size has with all kernels (is it in
the cache?), and what a kernel has at a size. s_i is the estimate's own standard deviation, 1 for the roofline. d is the Euclidean
distance in binary orders of the sizes, in which another format, op or parameter counts as INDICATOR of them; exp(-d) is the
covariance of a process without a smooth derivative, as tiles and caches make it. A measurement of kernel k, with noise, gives

    g = K_k / (K_kk + NOISE),   m <- m + g (y_k - m_k),   K <- K - g K_k'

(Rasmussen and Williams, Gaussian processes for machine learning, 2006, equations 2.23 to 2.26, one observation at a time). The numbers are
rounded from maximum marginal likelihood on half of the CPU corpus's families; NOISE is that of the corpus's repeated measurements.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray[Any, np.dtype[np.float64]]
Indices = np.ndarray[Any, np.dtype[np.signedinteger[Any]]]

DEVICE, KERNEL, SHAPE, BOTH = 0.1, 0.1, 0.3, 0.2  # variances of ln(time), in units of the estimate's
LENGTH, INDICATOR = 10.0, 2.0  # binary orders
NOISE = 0.12**2
OF_DEVICE = frozenset(("bandwidth", "rate", "launch", "roofline", "intensity"))  # no sizes, or told by the others


@dataclass
class Posterior:
    """Mean and covariance of the residuals, given what was observed."""

    mean: Array
    covariance: Array

    def observe(self, k: int, residual: float) -> None:
        gain = self.covariance[:, k] / (self.covariance[k, k] + NOISE)
        self.mean = self.mean + gain * (residual - self.mean[k])
        self.covariance = self.covariance - np.outer(gain, self.covariance[k])

    def variance(self) -> Array:
        """Of what a measurement would show."""
        return np.maximum(np.diag(self.covariance), 0.0) + NOISE

    def draw(self, open_: Indices, normal: Array) -> Array:
        """One world a row of standard `normal`s: residuals of the `open_` kernels, as measurements would show them."""
        inside = self.covariance[np.ix_(open_, open_)] + NOISE * np.eye(len(open_))
        return self.mean[open_] + normal[:, open_] @ np.linalg.cholesky(inside).T


def prior(found: Sequence[Mapping[str, float]], deviations: Sequence[float]) -> Posterior:
    """`found`: features of each kernel (features.py); `deviations`: of their estimates."""
    kernels = [next(name for name in f if name.startswith("kernel=")) for f in found]
    names = sorted({n for f in found for n in f if n not in OF_DEVICE and not n.startswith(("kernel=", "device="))})
    x = np.array([[f.get(n, 0.0) * (INDICATOR if "=" in n else 1.0) for n in names] for f in found]).reshape(len(found), len(names))
    square = (x**2).sum(1)
    near = np.exp(-np.sqrt(np.maximum(square[:, None] + square - 2 * x @ x.T, 0.0)) / LENGTH)
    same = np.array([[float(a == b) for b in kernels] for a in kernels]).reshape(len(found), len(found))
    s = np.array(deviations, dtype=np.float64)
    return Posterior(np.zeros(len(found)), np.outer(s, s) * (DEVICE + KERNEL * same + (SHAPE + BOTH * same) * near))
