// The microkernel: a few rows of A times one panel of packed B. Everything that multiplies matrices here is made of it.
//
// A panel holds NR = 2 * W columns; for each step of P elements of K it stores the P elements of every column side by side:
// [K / P][NR][P]. Each output element is one accumulator that walks K in order, so it is the same to the bit whatever MR is.
#pragma once

#include <new>
#include <vector>

#include "kv_ahead.h"
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
constexpr int MAX_MR = 14;  // 28 accumulators, 2 of B, 1 of A: 31 of 32 registers
#elif defined(__AVX2__)
constexpr int MAX_MR = 4;
#else
constexpr int MAX_MR = 4;
#endif

inline int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
template <class E> inline int64_t steps_of(int64_t k) { return (k + E::P - 1) / E::P; }
template <class E> inline int64_t panel_size(int64_t k) { return steps_of<E>(k) * NR * E::P; }

// c += products of two numbers beside each other, of bfloat16.
#if defined(__AVX512BF16__)
inline void accumulate2(F& c, I a, I b) { c.v = _mm512_dpbf16_ps(c.v, (__m512bh)a.v, (__m512bh)b.v); }
#else
inline void accumulate2(F& c, I a, I b) { c = fma(high(a), high(b), fma(low(a), low(b), c)); }
#endif
// Of 16-bit integers, exact as long as the sums fit into 32 bits.
#if defined(__AVX512VNNI__) && !defined(XLLM_NO_ASM)
inline void accumulate2(I& c, I a, I b) { asm("vpdpwssd %2, %1, %0" : "+v"(c.v) : "v"(a.v), "v"(b.v)); }  // in place, as `accumulate4`
#elif defined(__AVX512F__)
inline void accumulate2(I& c, I a, I b) { c.v = _mm512_add_epi32(c.v, _mm512_madd_epi16(a.v, b.v)); }
#elif defined(__AVX2__)
inline void accumulate2(I& c, I a, I b) { c.v = _mm256_add_epi32(c.v, _mm256_madd_epi16(a.v, b.v)); }
#else
inline void accumulate2(I& c, I a, I b) {
  for (int i = 0; i < W; i++)
    c.v[i] += static_cast<int16_t>(a.v[i]) * static_cast<int16_t>(b.v[i]) + static_cast<int16_t>(a.v[i] >> 16) * static_cast<int16_t>(b.v[i] >> 16);
}
#endif

// Rows up to which a product takes less time than its weight takes to come from memory.
constexpr int FEW_ROWS = MAX_MR > 4 ? 4 : MAX_MR - 1;

// Ask for one step of K of packed weights. Few rows wait for nothing else: it goes next to the processor. With more the panel at hand lives there,
// and the next one waits in the second-level cache.
template <int MR> inline __attribute__((always_inline)) void fetch_step(const char* line) {
#if defined(__AVX512F__)
  if (MR <= FEW_ROWS) _mm_prefetch(line, _MM_HINT_T0), _mm_prefetch(line + 64, _MM_HINT_T0);
  else _mm_prefetch(line, _MM_HINT_T1), _mm_prefetch(line + 64, _MM_HINT_T1);
#elif defined(__AVX2__)  // a step is one line
  if (MR <= FEW_ROWS) _mm_prefetch(line, _MM_HINT_T0);
  else _mm_prefetch(line, _MM_HINT_T1);
#else
  (void)line;
#endif
}

// Ask for a line of `runs`, and go on by half of it: the second time costs less than a branch.
inline __attribute__((always_inline)) void fetch_run(const Runs& runs, int64_t k, const char*& line) {
#if defined(__AVX2__)
  if (k % Runs::STEPS == 0) line = runs[k];
  _mm_prefetch(line, _MM_HINT_T1);
  line += 32;
#else
  (void)runs, (void)k, (void)line;
#endif
}

// Where to ask, for one tile of `count` over a panel. A few rows ask for what they are about to read; more, which come over it tile by tile, for the
// panel behind it, a part in each tile: asked for in one of them it would want more than memory gives, and nothing from memory in the others.
struct Ahead {
  int64_t start, stride;  // bytes from the panel's beginning, and from step to step of K

  template <int MR> static Ahead of(int64_t panel_bytes, int64_t step_bytes, int64_t tile, int64_t count) {
    if (MR <= FEW_ROWS) return {4096, step_bytes};
    return {panel_bytes + panel_bytes * tile / count, (step_bytes + count - 1) / count};
  }
};

// Rows of a matrix, MR of them, walked together: a pointer to every fourth. One a row is what a compiler would keep, and they are more than it has.
template <class T, int MR> class Rows {
 public:
  Rows(const T* first, int64_t stride) : one_(stride * static_cast<int64_t>(sizeof(T))), three_(3 * one_) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) at_[g] = reinterpret_cast<const char*>(first + 4 * g * stride);
  }
  inline __attribute__((always_inline)) const void* operator[](int i) const { return at_[i / 4] + (i % 4 == 3 ? three_ : i % 4 * one_); }
  inline __attribute__((always_inline)) void advance(int64_t bytes) {
#pragma GCC unroll 4
    for (int g = 0; g < GROUPS; g++) {
      at_[g] += bytes;
      asm("" : "+r"(at_[g]));
    }
  }

 private:
  static constexpr int GROUPS = (MR + 3) / 4;
  const char* at_[GROUPS];
  const int64_t one_, three_;
};

// c[i] += a[i] * B over `steps` steps of K; sums are floats, or of 16-bit integers 32-bit ones. FETCHES: B is a weight; what `ahead` says of it is asked for, and with more than a few rows `runs` too.
template <class E, int MR, bool FETCHES = false, class Sum = F>
inline __attribute__((always_inline)) void multiply(
    const typename E::T* a, int64_t lda, const typename E::T* b, int64_t steps, Sum (&c)[MR][2], Ahead ahead = {}, const Runs* runs = nullptr) {
  Rows<typename E::T, MR> rows(a, lda);
  const char *line = reinterpret_cast<const char*>(b) + ahead.start, *other = nullptr;
  for (int64_t k = 0; k < steps; k++, b += NR * E::P) {
    if constexpr (FETCHES) fetch_step<MR>(line), line += ahead.stride;
    if constexpr (FETCHES && MR > FEW_ROWS) fetch_run(*runs, k, other);
    if constexpr (E::P == 2) {
      const I b0 = loadi(b), b1 = loadi(b + NR);
#pragma GCC unroll 14
      for (int i = 0; i < MR; i++) {
        const I x = bcast(rows[i]);
        accumulate2(c[i][0], x, b0);
        accumulate2(c[i][1], x, b1);
      }
    } else {
      const F b0 = load(b), b1 = load(b + W);
#pragma GCC unroll 14
      for (int i = 0; i < MR; i++) {
        const F x = set1(*static_cast<const float*>(rows[i]));
        c[i][0] = fma(x, b0, c[i][0]);
        c[i][1] = fma(x, b1, c[i][1]);
      }
    }
    rows.advance(sizeof(typename E::T) * E::P);
  }
}

// Call fn<MR>() for mr in 1 .. MR.
template <int MR = MAX_MR, class Fn> inline void with_rows(int mr, Fn&& fn) {
  if (mr == MR) fn.template operator()<MR>();
  else if constexpr (MR > 1) with_rows<MR - 1>(mr, static_cast<Fn&&>(fn));
}

}  // namespace xllm
