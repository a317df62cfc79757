// The microkernel: a few rows of A times one panel of packed B. Everything that multiplies matrices here is made of it.
//
// A panel holds NR = 2 * W columns; for each step of P elements of K it stores the P elements of every column side by side:
// [K / P][NR][P]. Each output element is one accumulator that walks K in order, so it is the same to the bit whatever MR is.
#pragma once

#include <new>
#include <vector>

#include "vec.h"

namespace xllm {

// Buffers that begin with a cache line: a vector that lies across two of them is loaded at half the speed.
template <class T> struct LineAllocator {
  using value_type = T;
  static constexpr std::align_val_t LINE{64};
  LineAllocator() = default;
  template <class U> LineAllocator(const LineAllocator<U>&) {}
  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), LINE)); }
  void deallocate(T* p, std::size_t) { ::operator delete(p, LINE); }
  bool operator==(const LineAllocator&) const { return true; }
};
template <class T> using Lines = std::vector<T, LineAllocator<T>>;

constexpr int NR = 2 * W;
#if defined(__AVX512F__)
constexpr int MAX_MR = 12;  // 24 accumulators, 2 of B, 1 of A: 27 of 32 registers
#elif defined(__AVX2__)
constexpr int MAX_MR = 4;
#else
constexpr int MAX_MR = 4;
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class E> inline int64_t steps_of(int64_t k) { return (k + E::P - 1) / E::P; }
template <class E> inline int64_t panel_size(int64_t k) { return steps_of<E>(k) * NR * E::P; }

#if defined(__AVX512BF16__)
inline F dot2(F c, I a, I b) { return {_mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v)}; }
#else
inline F dot2(F c, I a, I b) { return fma(high(a), high(b), fma(low(a), low(b), c)); }
#endif

constexpr int FEW_ROWS = 4;  // up to which a product takes less time than its weight takes to come from memory

// Ask for one step of K of packed weights, which lies `ahead` bytes further on. Few rows wait for nothing else: it goes next to the processor. With
// more the panel at hand lives there, and the next one waits in the second-level cache.
template <int MR> inline __attribute__((always_inline)) void fetch_step(const void* b, int64_t ahead) {
#if defined(__AVX512F__)
  const auto* line = static_cast<const char*>(b) + ahead;
  if (MR <= FEW_ROWS) _mm_prefetch(line, _MM_HINT_T0), _mm_prefetch(line + 64, _MM_HINT_T0);
  else _mm_prefetch(line, _MM_HINT_T1), _mm_prefetch(line + 64, _MM_HINT_T1);
#else
  (void)b, (void)ahead;
#endif
}

// How far ahead to ask: few rows a page; more, in the last tile of a panel, the whole panel. 0 asks for what is there.
template <int MR> inline int64_t bytes_ahead(int64_t panel_bytes, bool is_last) { return MR <= FEW_ROWS ? 4096 : is_last ? panel_bytes : 0; }

// c[i] += a[i] * B over `steps` steps of K. FETCHES: B is a weight, read `ahead` bytes ahead of itself.
template <class E, int MR, bool FETCHES = false>
inline __attribute__((always_inline)) void multiply(
    const typename E::T* a, int64_t lda, const typename E::T* b, int64_t steps, F (&c)[MR][2], int64_t ahead = 0) {
  for (int64_t k = 0; k < steps; k++, b += NR * E::P) {
    if constexpr (FETCHES) fetch_step<MR>(b, ahead);
    if constexpr (E::P == 2) {
      const I b0 = loadi(b), b1 = loadi(b + NR);
#pragma GCC unroll 12
      for (int i = 0; i < MR; i++) {
        const I x = bcast(a + i * lda + k * 2);
        c[i][0] = dot2(c[i][0], x, b0);
        c[i][1] = dot2(c[i][1], x, b1);
      }
    } else {
      const F b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 12
      for (int i = 0; i < MR; i++) {
        const F x = set1(a[i * lda + k]);
        c[i][0] = fma(x, b0, c[i][0]);
        c[i][1] = fma(x, b1, c[i][1]);
      }
    }
  }
}

// Call fn<MR>() for mr in 1 .. MR.
template <int MR = MAX_MR, class Fn> inline void with_rows(int mr, Fn&& fn) {
  if (mr == MR) fn.template operator()<MR>();
  else if constexpr (MR > 1) with_rows<MR - 1>(mr, static_cast<Fn&&>(fn));
}

}  // namespace xllm
