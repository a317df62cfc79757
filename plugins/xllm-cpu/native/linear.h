// One product over packed weights, as linear maps and experts need it: rows of x times panels, bias, activation, rounding.
#pragma once

#include <algorithm>

#include "gemm.h"
#include "pool.h"

namespace xllm {

constexpr int64_t BLOCK_ROWS = 16 * MAX_MR;  // rows of x that pass over one panel before the next: they stay in the second-level cache

// The weight's row of column `lane` of panel `panel`. With `fuses` gate and up alternate by vectors: lanes 0 .. W-1 are gates, W .. NR-1 the ups.
inline int64_t source_row(int64_t panel, int lane, int64_t n, bool fuses) {
  if (!fuses) return panel * NR + lane < n ? panel * NR + lane : -1;
  const int64_t inner = n / 2, at = panel * W + lane % W;
  return at < inner ? (lane < W ? at : inner + at) : -1;
}

inline int64_t num_panels(int64_t n, bool fuses) { return fuses ? round_up(n / 2, W) / W : round_up(n, NR) / NR; }

inline F silu(F x) { return div(x, add(set1(1.0f), vexp(sub(zero(), x)))); }

// What multiplies: `tile<MR>(row, panel, at, count)` computes MR rows from `row` on by one panel, as the at-th tile of `count` over it. Rows first ..
// last - 1, in tiles of nearly equal height.
template <class Tiles> void tile_rows(const Tiles& tiles, int64_t first, int64_t last, int64_t panel) {
  const int64_t height = last - first, count = (height + MAX_MR - 1) / MAX_MR;
  for (int64_t t = 0; t < count; t++) {
    const int64_t begin = first + height * t / count, end = first + height * (t + 1) / count;
    with_rows(static_cast<int>(end - begin), [&]<int MR>() { tiles.template tile<MR>(begin, panel, t, count); });
  }
}

// m rows by all panels, on all threads. Pieces are equal but for one panel, and so small that no thread ends much after the others. Few rows read
// weights, ahead of themselves, and beyond the end of a piece in vain: their pieces are larger.
template <class Tiles> void run_tiles(const Tiles& tiles, int64_t m, int64_t count, bool is_streamed = false) {
  if (m == 0) return;
  const int64_t blocks = (m + BLOCK_ROWS - 1) / BLOCK_ROWS, wanted = (m <= 4 ? 4 : 32) * num_threads();
  const int64_t groups = blocks >= wanted ? 1 : std::min(count, (wanted + blocks - 1) / blocks);
  parallel_for(blocks * groups, [&](int64_t piece) {
    const int64_t block = piece / groups, group = piece % groups;
    const int64_t first = block * BLOCK_ROWS, last = first + BLOCK_ROWS < m ? first + BLOCK_ROWS : m;
    for (int64_t panel = count * group / groups; panel < count * (group + 1) / groups; panel++) tile_rows(tiles, first, last, panel);
    if (is_streamed) drain();  // before others are told that the piece is done
  });
}

// Whether wide results are written past the caches: so many that those would first fetch each line from memory, and soon give it back.
inline bool streams(const void* out, int64_t m, int64_t n, int64_t ldo, bool is_wide) {
  constexpr int64_t LEAST_BYTES = 2 << 20, ALIGNMENT = W * sizeof(float);
  return is_wide && m * n * static_cast<int64_t>(sizeof(float)) >= LEAST_BYTES && reinterpret_cast<uintptr_t>(out) % ALIGNMENT == 0 && ldo % W == 0;
}

// Sums of one row and panel to results: bias, activation, rounding.
template <class E> struct Output {
  const float* bias;  // in the order of packed lanes, padded; null for none
  void* out;          // E::T, or float with is_wide
  int64_t n, ldo;
  bool fuses, is_wide, is_streamed;

  void store(int64_t row, int64_t panel, F c0, F c1) const {
    if (bias != nullptr) c0 = add(c0, load(bias + panel * NR)), c1 = add(c1, load(bias + panel * NR + W));
    if (fuses) store_part<E>(static_cast<typename E::T*>(out) + row * ldo + panel * W, mul(silu(c0), c1), n / 2 - panel * W);
    else if (is_streamed && n - panel * NR >= NR) to_memory(row, panel, c0, c1);
    else if (is_wide) put<F32>(row, panel, c0, c1);
    else put<E>(row, panel, c0, c1);
  }

  void to_memory(int64_t row, int64_t panel, F c0, F c1) const {
    float* to = static_cast<float*>(out) + row * ldo + panel * NR;
    xllm::stream(to, c0), xllm::stream(to + W, c1);
  }

  template <class O> void put(int64_t row, int64_t panel, F c0, F c1) const {
    typename O::T* to = static_cast<typename O::T*>(out) + row * ldo + panel * NR;
    const int64_t left = n - panel * NR;
    store_part<O>(to, c0, left);
    if (left > W) store_part<O>(to + W, c1, left - W);
  }
};

template <class E> struct Call {
  const typename E::T* x;
  const typename E::T* packed;
  const float* bias;
  void* out;
  int64_t m, n, k, ldx, ldo;
  bool fuses, is_wide, is_streamed = streams(out, m, n, ldo, is_wide);
  NextAttention next = next_attention();

  template <int MR> void tile(int64_t row, int64_t panel, int64_t at, int64_t count) const {
    constexpr int64_t BYTES = sizeof(typename E::T);
    const int64_t size = panel_size<E>(k);
    const Runs runs(next, MR > FEW_ROWS ? steps_of<E>(k) : 0, packed + panel * size);
    F c[MR][2];
    for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = zero();
    multiply<E, MR, true>(x + row * ldx, ldx, packed + panel * size, steps_of<E>(k), c, Ahead::of<MR>(size * BYTES, NR * E::P * BYTES, at, count), &runs);
    const Output<E> to{bias, out, n, ldo, fuses, is_wide, is_streamed};
    for (int i = 0; i < MR; i++) to.store(row + i, panel, c[i][0], c[i][1]);
  }

  // Every row over some panels.
  void panels(int64_t begin, int64_t end) const {
    for (int64_t first = 0; first < m; first += BLOCK_ROWS)
      for (int64_t panel = begin; panel < end; panel++) tile_rows(*this, first, first + BLOCK_ROWS < m ? first + BLOCK_ROWS : m, panel);
  }

  void run() const { run_tiles(*this, m, num_panels(n, fuses), is_streamed); }
};

}  // namespace xllm
