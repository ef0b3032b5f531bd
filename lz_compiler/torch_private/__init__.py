"""Every private interface of torch that LayerZero uses, behind names of our own: a new torch version is this package's work.

`graphs`: FX graphs, fake tensors and symbolic sizes; `inductor`: compiling, passes and lowerings; `generated`: what Inductor generated;
`runtime`: what surrounds a running graph; `distributed`: ranks of a job. Imports of torch's private modules are inside the functions, so
that `import lz_compiler` costs nothing.
"""

from __future__ import annotations

import torch

from ..errors import TorchVersionError
from .distributed import *  # noqa: F403
from .generated import *  # noqa: F403
from .graphs import *  # noqa: F403
from .inductor import *  # noqa: F403
from .runtime import *  # noqa: F403

SUPPORTED = ((2, 11), (2, 15))


def check_version() -> None:
    """Raise TorchVersionError outside the range that this module was written against."""
    low, high = SUPPORTED
    found = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if not low <= found <= high:
        raise TorchVersionError(
            f"lz_compiler works with torch {low[0]}.{low[1]} to {high[0]}.{high[1]}, found {torch.__version__}. "
            f"Install one of them, for example: pip install 'torch=={high[0]}.{high[1]}.*'"
        )
