// Linear maps over packed weights: x @ weight.T + bias, and the same followed by silu(gate) * up.
//
// Limits. Few rows: the bytes of the weight over the bandwidth of memory; each panel is read once and stays in the second-level cache while
// all tiles of rows pass over it. Many rows: 2 * M * N * K over the peak of the multiply-add; a panel of K = 576 in bfloat16 takes 36 KiB, a
// tile of 12 rows 13 KiB.
#include "api.h"
#include "gemm.h"
#include "pool.h"

namespace xllm {
namespace {

constexpr int64_t BLOCK_ROWS = 16 * MAX_MR;  // rows of x that pass over one panel before the next: they stay in the second-level cache

// The weight's row of column `lane` of panel `panel`. With `fuses` gate and up alternate by vectors: lanes 0 .. W-1 are gates, W .. NR-1 the ups.
inline int64_t source_row(int64_t panel, int lane, int64_t n, bool fuses) {
  if (!fuses) return panel * NR + lane < n ? panel * NR + lane : -1;
  const int64_t inner = n / 2, at = panel * W + lane % W;
  return at < inner ? (lane < W ? at : inner + at) : -1;
}

inline int64_t num_panels(int64_t n, bool fuses) { return fuses ? round_up(n / 2, W) / W : round_up(n, NR) / NR; }

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

inline F silu(F x) { return div(x, add(set1(1.0f), vexp(sub(zero(), x)))); }

template <class E> struct Call {
  const typename E::T* x;
  const typename E::T* packed;
  const float* bias;  // in the order of packed lanes, padded; null for none
  typename E::T* out;
  int64_t m, n, k, ldx, ldo;
  bool fuses;

  template <int MR> void tile(int64_t row, int64_t panel) const {
    F c[MR][2];
    for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = zero();
    multiply<E, MR>(x + row * ldx, ldx, packed + panel * panel_size<E>(k), steps_of<E>(k), c);
    if (bias != nullptr) {
      const F b0 = load(bias + panel * NR), b1 = load(bias + panel * NR + W);
      for (int i = 0; i < MR; i++) c[i][0] = add(c[i][0], b0), c[i][1] = add(c[i][1], b1);
    }
    for (int i = 0; i < MR; i++) {
      typename E::T* to = out + (row + i) * ldo;
      if (fuses) {
        store_part<E>(to + panel * W, mul(silu(c[i][0]), c[i][1]), n / 2 - panel * W);
      } else {
        const int64_t left = n - panel * NR;
        store_part<E>(to + panel * NR, c[i][0], left);
        if (left > W) store_part<E>(to + panel * NR + W, c[i][1], left - W);
      }
    }
  }

  void rows(int64_t first, int64_t last, int64_t panel) const {
    const int64_t count = last - first, tiles = (count + MAX_MR - 1) / MAX_MR;
    for (int64_t t = 0; t < tiles; t++) {  // tiles of nearly equal height
      const int64_t begin = first + count * t / tiles, end = first + count * (t + 1) / tiles;
      with_rows(static_cast<int>(end - begin), [&]<int MR>() { tile<MR>(begin, panel); });
    }
  }

  void run() const {
    if (m == 0) return;
    const int64_t panels = num_panels(n, fuses), blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS;
    const int64_t wanted = 8 * num_threads();
    const int64_t grain = blocks >= wanted ? panels : (panels * blocks + wanted - 1) / wanted;
    const int64_t groups = (panels + grain - 1) / grain;
    parallel_for(blocks * groups, [&](int64_t piece) {
      const int64_t block = piece / groups, group = piece % groups;
      const int64_t first = block * BLOCK_ROWS, last = first + BLOCK_ROWS < m ? first + BLOCK_ROWS : m;
      for (int64_t panel = group * grain; panel < panels && panel < (group + 1) * grain; panel++) rows(first, last, panel);
    });
  }
};

template <class E>
int run(const void* x, const void* packed, const float* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int fuses) {
  using T = typename E::T;
  Call<E>{static_cast<const T*>(x), static_cast<const T*>(packed), bias, static_cast<T*>(out), m, n, k, ldx, ldo, fuses != 0}.run();
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
    const void* x, const void* packed, const float* bias, void* out, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int is_bf16, int fuses) {
  return is_bf16 ? run<Bf16>(x, packed, bias, out, m, n, k, ldx, ldo, fuses) : run<F32>(x, packed, bias, out, m, n, k, ldx, ldo, fuses);
}
