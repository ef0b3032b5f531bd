// Attention on a CPU in float32: both products by oneDNN's small matrix kernels (as torch exports them), the softmax
// between them on a block of rows that stays in the cache. torch's own flash kernel calls MKL for the products.
#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/native/CPUBlas.h>
#include <torch/library.h>

namespace {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size(), ROWS = 64;

float reduce(Vec (*f)(const Vec&, const Vec&), const Vec& x) {
  return at::vec::vec_reduce_all<float>([f](Vec& a, Vec& b) { return f(a, b); }, x);
}

// One row of scores becomes exp(scale * score + bias - top) over its first `seen` of `keys` columns, 0 after; returns 1 / sum.
// A row that is masked out entirely is 0, as in eager.
float softmax(float* row, const float* bias, float scale, int64_t seen, int64_t keys) {
  Vec top(-INFINITY), sum(0.f);
  for (int64_t c = 0; c < seen; c += W) {
    const int64_t w = std::min(W, seen - c);
    Vec x = Vec::loadu(row + c, w) * Vec(scale);
    if (bias) x = x + Vec::loadu(bias + c, w);
    x = Vec::set(Vec(-INFINITY), x, w);
    x.store(row + c);
    top = at::vec::maximum(top, x);  // keeps NaN
  }
  const float most = reduce([](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); }, top);
  const Vec shift(most == -INFINITY ? 0.f : most);
  for (int64_t c = 0; c < seen; c += W) {
    const Vec x = (Vec::loadu(row + c) - shift).exp_u20();
    x.store(row + c);
    sum = sum + x;
  }
  for (int64_t c = (seen + W - 1) / W * W; c < keys; c++) row[c] = 0.f;
  const float total = reduce([](const Vec& a, const Vec& b) { return a + b; }, sum);
  return total == 0.f ? 0.f : 1.f / total;
}

// The tensor with a contiguous last dimension. The planner offers the kernel for such tensors only, but Inductor may lay out what it
// makes itself (repeated heads) in another order.
at::Tensor dense(const at::Tensor& t) { return t.stride(-1) == 1 ? t : t.contiguous(); }

// q (B, H, L, D), k and v (B, G, S, D | E), mask (B, H, L, S) after broadcasting.
at::Tensor attention(
    const at::Tensor& given_q, const at::Tensor& given_k, const at::Tensor& given_v, const std::optional<at::Tensor>& given_mask,
    bool causal, double scale) {
  const at::Tensor q = dense(given_q), k = dense(given_k), v = dense(given_v);
  const std::optional<at::Tensor> mask = given_mask ? std::optional<at::Tensor>(dense(*given_mask)) : std::nullopt;
  const int64_t H = q.size(1), L = q.size(2), D = q.size(3), S = k.size(2), E = v.size(3), repeat = H / k.size(1);
  const at::Tensor out = at::empty({q.size(0), L, H, E}, q.options()).transpose(1, 2);
  const at::Tensor bias = mask ? mask->expand({q.size(0), H, L, S}) : at::Tensor();
  const auto at_row = [](const at::Tensor& t, int64_t b, int64_t h, int64_t l) {
    return t.const_data_ptr<float>() + b * t.stride(0) + h * t.stride(1) + l * t.stride(2);
  };
  const int64_t N = (S + W - 1) / W * W;  // keys, padded to whole vectors
  at::parallel_for(0, q.size(0) * H, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> keys_t(D * N, 0.f), scores(ROWS * N), result(ROWS * E);
    float inverse[ROWS];
    for (int64_t task = begin; task < end; task++) {
      const int64_t b = task / H, h = task % H, g = h / repeat;
      for (int64_t s = 0; s < S; s += 16)
        for (int64_t d = 0; d < D; d += 16)
          at::vec::transpose_mxn<float>(at_row(k, b, g, s) + d, k.stride(2), keys_t.data() + d * N + s, N,
                                        std::min<int64_t>(16, S - s), std::min<int64_t>(16, D - d));
      for (int64_t l = 0; l < L; l += ROWS) {
        const int64_t rows = std::min(ROWS, L - l), keys = causal ? std::min(S, l + rows) : S;
        at::native::cpublas::brgemm(rows, (keys + W - 1) / W * W, D, q.stride(2), N, N, false,
                                    at_row(q, b, h, l), keys_t.data(), scores.data());
        for (int64_t r = 0; r < rows; r++)
          inverse[r] = softmax(scores.data() + r * N, mask ? at_row(bias, b, h, l + r) : nullptr, scale,
                               causal ? std::min(keys, l + r + 1) : keys, keys);
        at::native::cpublas::brgemm(rows, E, keys, N, v.stride(2), E, false, scores.data(), at_row(v, b, g, 0), result.data());
        for (int64_t r = 0; r < rows; r++)
          at::vec::map<float>([&](Vec x) { return x * Vec(inverse[r]); }, const_cast<float*>(at_row(out, b, h, l + r)),
                              result.data() + r * E, E);
      }
    }
    at::native::cpublas::brgemm_release(false);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(lz, m) {
  m.def("attention_brgemm(Tensor q, Tensor k, Tensor v, Tensor? mask, bool causal, float scale) -> Tensor",
        {at::Tag::pt2_compliant_tag, at::Tag::needs_fixed_stride_order});
  m.impl("attention_brgemm", c10::DispatchKey::CPU, TORCH_FN(attention));
}
