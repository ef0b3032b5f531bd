// What TorchInductor's C++ templates (FlexAttention, products) include beside its prefix: read once, see precompile_headers.
#include <torch/csrc/inductor/cpp_prefix.h>
#if __has_include(<c10/util/Unroll.h>)
#include <c10/util/Unroll.h>
#endif
#if __has_include(<torch/csrc/inductor/aoti_torch/c/shim.h>)
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#endif
#if __has_include(<ATen/native/cpu/utils.h>)
#include <ATen/native/cpu/utils.h>
#endif
#if __has_include(<ATen/native/CPUBlas.h>)
#include <ATen/native/CPUBlas.h>
#endif
#if __has_include(<ATen/Context.h>)
#include <ATen/Context.h>
#endif
