"""What a key-value cache is to a kernel: how it is cut up and laid out, never what stands in it."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import OptionError, unknown

STRATEGIES = ("contiguous", "paged")
LAYOUTS = ("NHD", "HND")
DTYPES = ("bfloat16", "float16", "float32", "float64")
DEVICES = ("cpu", "cuda")


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCacheSpec:
    """The facts about a cache that decide which kernels can read it. Hashable; holds no tensor.

    `strategy` "contiguous" is one run of tokens for each batch entry; "paged" is a pool of pages of `page_size` tokens, which
    block tables share out (Kwon et al., Efficient memory management for large language model serving with PagedAttention, 2023).
    `layout` is the order inside one entry or page: "NHD" (tokens, kv_heads, head_size) or "HND" (kv_heads, tokens, head_size).
    `page_size` is None for a contiguous cache. `dtype` as torch prints it without the `torch.` prefix, `device` a device type.

    Raises OptionError for a field that is none of these.
    """

    strategy: str
    kv_heads: int
    head_size: int
    dtype: str
    device: str
    page_size: int | None = None
    layout: str = "NHD"

    def __post_init__(self) -> None:
        for name, allowed in (("strategy", STRATEGIES), ("layout", LAYOUTS), ("dtype", DTYPES), ("device", DEVICES)):
            value = getattr(self, name)
            if value not in allowed:
                raise OptionError(f"KVCacheSpec: {unknown(name, value, allowed)}")
        for name in ("kv_heads", "head_size", *(("page_size",) if self.strategy == "paged" else ())):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise OptionError(f"KVCacheSpec: {name} is {value!r}. Give a whole number above 0.")
        if self.strategy == "contiguous" and self.page_size is not None:
            raise OptionError(f"KVCacheSpec: page_size is {self.page_size!r}. A contiguous cache has no pages: leave it out.")
