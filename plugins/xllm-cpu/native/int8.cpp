// Linear maps over 8-bit integers: a step per output channel, a step per row of x, sums in 32 bits, scaled once in float32.
//
// Rows of x are turned into unsigned bytes with a zero point first, as VPDPBUSD multiplies unsigned by signed; each accumulator starts at minus the
// zero point times the sum of its weights. Sums are exact modulo 2**32, and what they stand for fits up to K = 65,536, so every instruction set
// gives the same results; `contracts/ops.py` of the core defines them.
//
// A panel is [NR] int32 sums of weights, [NR] float steps, then [K / 4][NR][4] weights. Limits as in linear.cpp, with half the bytes.
#include <algorithm>
#include <cstddef>

#include "api.h"
#include "bytes.h"
#include "linear.h"
#include "pool.h"

namespace xllm {
namespace {

constexpr int64_t ROW_HEAD = 64;  // in front of a row's bytes
struct RowHead {
  float step;
  int32_t minus_zero;
};

int64_t padded(int64_t k) { return round_up(k, P); }
int64_t panel_bytes(int64_t k) { return NR * (sizeof(int32_t) + sizeof(float)) + padded(k) * NR; }

void pack(const int8_t* weight, const float* steps, int64_t n, int64_t k, bool fuses, char* out) {
  parallel_for(num_panels(n, fuses), [&](int64_t panel) {
    char* head = out + panel * panel_bytes(k);
    char* to = head + NR * (sizeof(int32_t) + sizeof(float));
    for (int lane = 0; lane < NR; lane++) {
      const int64_t row = source_row(panel, lane, n, fuses);
      int32_t total = 0;
      for (int64_t at = 0; at < padded(k); at++) {
        const int8_t value = row >= 0 && at < k ? weight[row * k + at] : int8_t{0};
        total += value;
        to[(at / P * NR + lane) * P + at % P] = static_cast<char>(value);
      }
      const float step = row >= 0 ? steps[row] : 0.0f;
      std::memcpy(head + lane * sizeof total, &total, sizeof total);
      std::memcpy(head + (NR + lane) * sizeof step, &step, sizeof step);
    }
  });
}

// One row of x to its head and bytes.
template <class E> void to_bytes(const typename E::T* x, int64_t k, char* row) {
  F low = zero(), high = zero(), test = zero();
  for (int64_t i = 0; i < k; i += W) {
    const F part = load_part<E>(x + i, k - i);
    low = vmin(low, part), high = vmax(high, part), test = add(test, mul(part, zero()));  // 0 times what is not finite is NaN
  }
  const float least = -top(sub(zero(), low)), span = sum(test) + (top(high) - least);
  const bool is_finite = span <= 0x1.fffffep127f, is_zero = span < 0x1p-100f;
  const float factor = !is_finite || is_zero ? 0.0f : 255.0f / span;
  const int32_t zero_point = is_finite ? whole(-least * factor) : 0;
  const RowHead head{!is_finite ? __builtin_nanf("") : is_zero ? 0.0f : span / 255.0f, -zero_point};
  std::memcpy(row, &head, sizeof head);
  auto* to = reinterpret_cast<uint8_t*>(row + ROW_HEAD);
  for (int64_t i = 0; i < k; i++) {
    const int32_t value = whole(E::one(x[i]) * factor) + zero_point;
    to[i] = static_cast<uint8_t>(value < 255 ? value : 255);
  }
  for (int64_t i = k; i < padded(k); i++) to[i] = 0;
}

template <class E> struct Int8Call {
  const char* rows;
  const char* packed;
  int64_t k, row_bytes;
  Output<E> to;
  NextAttention next = next_attention();

  template <int MR> void tile(int64_t row, int64_t panel, int64_t nth, int64_t count) const {
    const Ahead ahead = Ahead::of<MR>(panel_bytes(k), NR * P, nth, count);
    const char* first = rows + row * row_bytes;
    const char* head = packed + panel * panel_bytes(k);
    const Runs runs(next, MR > FEW_ROWS ? padded(k) / P : 0, head);
    const char* steps = head + NR * sizeof(int32_t);
    const char* b = steps + NR * sizeof(float);
    I c[MR][2];
    const I total0 = loadi(head), total1 = loadi(head + W * sizeof(int32_t));
    unrolled<MR>([&](auto i) __attribute__((always_inline)) {
      const I minus_zero = bcast(first + i * row_bytes + offsetof(RowHead, minus_zero));
      c[i][0] = multiplied(minus_zero, total0), c[i][1] = multiplied(minus_zero, total1);
    });
    Rows<char, MR> a(first + ROW_HEAD, row_bytes);
    const char *line = b + ahead.start, *other = nullptr;
    for (int64_t at = 0; at < padded(k); at += P, b += NR * P, line += ahead.stride, a.advance(P)) {
      fetch_step<MR>(line);
      if constexpr (MR > FEW_ROWS) fetch_run(runs, at / P, other);
      const Bytes b0 = as_signed(loadi(b)), b1 = as_signed(loadi(b + W * P));
      unrolled<MR>([&](auto i) __attribute__((always_inline)) {
        const Bytes x = as_unsigned(bcast(a[i]));
        accumulate4(c[i][0], x, b0);
        accumulate4(c[i][1], x, b1);
      });
    }
    const F s0 = load(reinterpret_cast<const float*>(steps)), s1 = load(reinterpret_cast<const float*>(steps) + W);
    F out[MR][2];
    unrolled<MR>([&](auto i) __attribute__((always_inline)) {
      float own;
      std::memcpy(&own, first + i * row_bytes, sizeof own);
      out[i][0] = mul(to_float(c[i][0]), mul(set1(own), s0)), out[i][1] = mul(to_float(c[i][1]), mul(set1(own), s1));
    });
    for (int i = 0; i < MR; i++) to.store(row + i, panel, out[i][0], out[i][1]);
  }
};

template <class E>
void run(const void* x, const void* packed, const float* bias, void* out, void* room, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo,
         bool fuses, bool is_wide) {
  const int64_t row_bytes = xllm_int8_room(k);
  char* rows = static_cast<char*>(room);
  constexpr int64_t FEW = 1 << 15;  // elements that one thread turns into bytes sooner than it could ask another
  const int64_t grain = std::max<int64_t>(1, FEW / std::max<int64_t>(1, k));
  parallel_for((m + grain - 1) / grain, [&](int64_t piece) {
    for (int64_t i = piece * grain; i < m && i < (piece + 1) * grain; i++) to_bytes<E>(static_cast<const typename E::T*>(x) + i * ldx, k, rows + i * row_bytes);
  });
  const bool is_streamed = streams(out, m, n, ldo, is_wide);
  const Int8Call<E> tiles{rows, static_cast<const char*>(packed), k, row_bytes, {bias, out, n, ldo, fuses, is_wide, is_streamed}};
  run_tiles(tiles, m, num_panels(n, fuses), is_streamed);
}

}  // namespace
}  // namespace xllm

using namespace xllm;

int64_t xllm_int8_bytes(int64_t n, int64_t k, int fuses) { return num_panels(n, fuses != 0) * panel_bytes(k); }

int64_t xllm_int8_room(int64_t k) { return ROW_HEAD + round_up(k, 64); }

int xllm_pack_int8(const int8_t* weight, const float* steps, int64_t n, int64_t k, int fuses, void* out) {
  pack(weight, steps, n, k, fuses != 0, static_cast<char*>(out));
  return 0;
}

int xllm_linear_int8(
    const void* x, const void* packed, const float* bias, void* out, void* room, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int is_bf16,
    int fuses, int is_wide) {
  const auto call = is_bf16 != 0 ? run<Bf16> : run<F32>;
  call(x, packed, bias, out, room, m, n, k, ldx, ldo, fuses != 0, is_wide != 0);
  return 0;
}
