// Linear maps over packed weights: x @ weight.T + bias, and the same followed by silu(gate) * up.
//
// Limits. Few rows: the bytes of the weight over the bandwidth of memory; each panel is read once and stays in the second-level cache while
// all tiles of rows pass over it. Many rows: 2 * M * N * K over the peak of the multiply-add; a panel of K = 576 in bfloat16 takes 36 KiB, a
// tile of 14 rows 16 KiB.
#include "api.h"
#include "linear.h"
#include "pool.h"

namespace xllm {
namespace {

template <class E> void pack(const typename E::T* weight, int64_t n, int64_t k, bool fuses, typename E::T* out) {
  parallel_for(num_panels(n, fuses), [&](int64_t panel) {
    typename E::T* to = out + panel * panel_size<E>(k);
    for (int lane = 0; lane < NR; lane++) {
      const int64_t row = source_row(panel, lane, n, fuses);
      for (int64_t step = 0; step < steps_of<E>(k); step++)
        for (int p = 0; p < E::P; p++) {
          const int64_t at = step * E::P + p;
          to[(step * NR + lane) * E::P + p] = row >= 0 && at < k ? weight[row * k + at] : typename E::T{0};
        }
    }
  });
}

template <class E>
int run(const void* x, const void* packed, const float* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int fuses,
        int is_wide) {
  using T = typename E::T;
  Call<E>{static_cast<const T*>(x), static_cast<const T*>(packed), bias, out, m, n, k, ldx, ldo, fuses != 0, is_wide != 0}.run();
  return 0;
}

}  // namespace
}  // namespace xllm

using namespace xllm;

int64_t xllm_packed_elements(int64_t n, int64_t k, int is_bf16, int fuses) {
  return num_panels(n, fuses) * (is_bf16 ? panel_size<Bf16>(k) : panel_size<F32>(k));
}

int64_t xllm_packed_columns(int64_t n, int fuses) { return num_panels(n, fuses) * NR; }

int xllm_pack(const void* weight, int64_t n, int64_t k, int is_bf16, int fuses, void* out) {
  if (is_bf16) pack<Bf16>(static_cast<const bf16*>(weight), n, k, fuses, static_cast<bf16*>(out));
  else pack<F32>(static_cast<const float*>(weight), n, k, fuses, static_cast<float*>(out));
  return 0;
}

int xllm_pack_bias(const float* bias, int64_t n, int fuses, float* out) {
  for (int64_t panel = 0; panel < num_panels(n, fuses); panel++)
    for (int lane = 0; lane < NR; lane++) {
      const int64_t row = source_row(panel, lane, n, fuses);
      out[panel * NR + lane] = row >= 0 ? bias[row] : 0.0f;
    }
  return 0;
}

int xllm_linear(
    const void* x, const void* packed, const float* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int is_bf16, int fuses,
    int is_wide) {
  const auto call = is_bf16 ? run<Bf16> : run<F32>;
  return call(x, packed, bias, out, m, n, k, ldx, ldo, fuses, is_wide);
}
