// One vector of floats per instruction set, and the few operations the kernels are made of.
//
// The file is compiled once per instruction set, into a library each; Python loads the one that the processor can run. Rounding is the same
// in every kernel of a library: products and sums are fused where the instruction set fuses (never left to the compiler: it is built with
// -ffp-contract=off), and a row's result never depends on how many rows are computed together.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX512F__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace xllm {

using bf16 = uint16_t;

#if defined(__AVX512F__)

constexpr int W = 16;  // lanes of a vector
struct F { __m512 v; };
struct I { __m512i v; };

inline F zero() { return {_mm512_setzero_ps()}; }
inline F set1(float x) { return {_mm512_set1_ps(x)}; }
inline F load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline void store(float* p, F x) { _mm512_storeu_ps(p, x.v); }
inline void stream(float* p, F x) { _mm512_stream_ps(p, x.v); }
inline void drain() { _mm_sfence(); }
inline F add(F a, F b) { return {_mm512_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm512_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline F vmax(F a, F b) { return {_mm512_max_ps(a.v, b.v)}; }
inline F vmin(F a, F b) { return {_mm512_min_ps(a.v, b.v)}; }
inline I loadi(const void* p) { return {_mm512_loadu_si512(p)}; }
inline void storei(void* p, I x) { _mm512_storeu_si512(p, x.v); }
inline I bcast(const void* p) { int32_t x; std::memcpy(&x, p, 4); return {_mm512_set1_epi32(x)}; }
inline F to_float(I x) { return {_mm512_cvtepi32_ps(x.v)}; }
inline void store_int16(int16_t* p, F x) {  // rounded, halves to even; x fits
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(x.v)));
}
inline F low(I x) { return {_mm512_castsi512_ps(_mm512_slli_epi32(x.v, 16))}; }
inline F high(I x) { return {_mm512_castsi512_ps(_mm512_and_si512(x.v, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))}; }
inline F round_even(F x) { return {_mm512_roundscale_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F scale2(F x, F n) { return {_mm512_scalef_ps(x.v, n.v)}; }  // x * 2**n
inline F load_bf16(const bf16* p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16))};
}
inline void store_bf16(bf16* p, F x) {  // nearest, ties to even; NaN stays NaN
  __m512i u = _mm512_castps_si512(x.v);
  __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_srli_epi32(_mm512_add_epi32(u, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  __mmask16 nan = _mm512_cmp_ps_mask(x.v, x.v, _CMP_UNORD_Q);
  r = _mm512_mask_mov_epi32(r, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(r));
}

#elif defined(__AVX2__)

constexpr int W = 8;
struct F { __m256 v; };
struct I { __m256i v; };

inline F zero() { return {_mm256_setzero_ps()}; }
inline F set1(float x) { return {_mm256_set1_ps(x)}; }
inline F load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline void store(float* p, F x) { _mm256_storeu_ps(p, x.v); }
inline void stream(float* p, F x) { _mm256_stream_ps(p, x.v); }
inline void drain() { _mm_sfence(); }
inline F add(F a, F b) { return {_mm256_add_ps(a.v, b.v)}; }
inline F sub(F a, F b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline F mul(F a, F b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline F div(F a, F b) { return {_mm256_div_ps(a.v, b.v)}; }
inline F fma(F a, F b, F c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline F vmax(F a, F b) { return {_mm256_max_ps(a.v, b.v)}; }
inline F vmin(F a, F b) { return {_mm256_min_ps(a.v, b.v)}; }
inline I loadi(const void* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline I bcast(const void* p) { int32_t x; std::memcpy(&x, p, 4); return {_mm256_set1_epi32(x)}; }
inline F to_float(I x) { return {_mm256_cvtepi32_ps(x.v)}; }
inline void store_int16(int16_t* p, F x) {
  const __m256i whole = _mm256_cvtps_epi32(x.v), packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(whole, whole), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}
inline F low(I x) { return {_mm256_castsi256_ps(_mm256_slli_epi32(x.v, 16))}; }
inline F high(I x) { return {_mm256_castsi256_ps(_mm256_and_si256(x.v, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))}; }
inline F round_even(F x) { return {_mm256_round_ps(x.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline F scale2(F x, F n) {
  __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(x.v, _mm256_castsi256_ps(e))};
}
inline F load_bf16(const bf16* p) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
inline void store_bf16(bf16* p, F x) {
  __m256i u = _mm256_castps_si256(x.v);
  __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  __m256i r = _mm256_srli_epi32(_mm256_add_epi32(u, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff))), 16);
  __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x.v, x.v, _CMP_UNORD_Q));
  r = _mm256_blendv_epi8(r, _mm256_set1_epi32(0x7fc0), nan);
  __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(r, r), 0xd8);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
}

#else  // portable: what every compiler turns into the machine's own vectors

constexpr int W = 4;
struct F { float v[W]; };
struct I { int32_t v[W]; };

template <class T, class Fn> inline T each(Fn fn) { T r; for (int i = 0; i < W; i++) r.v[i] = fn(i); return r; }
inline float as_float(uint32_t u) { float f; std::memcpy(&f, &u, 4); return f; }
inline uint32_t as_bits(float f) { uint32_t u; std::memcpy(&u, &f, 4); return u; }
inline F zero() { return each<F>([](int) { return 0.0f; }); }
inline F set1(float x) { return each<F>([=](int) { return x; }); }
inline F load(const float* p) { F r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline void store(float* p, F x) { std::memcpy(p, x.v, sizeof x.v); }
inline void stream(float* p, F x) { store(p, x); }
inline void drain() {}
inline F add(F a, F b) { return each<F>([&](int i) { return a.v[i] + b.v[i]; }); }
inline F sub(F a, F b) { return each<F>([&](int i) { return a.v[i] - b.v[i]; }); }
inline F mul(F a, F b) { return each<F>([&](int i) { return a.v[i] * b.v[i]; }); }
inline F div(F a, F b) { return each<F>([&](int i) { return a.v[i] / b.v[i]; }); }
inline F fma(F a, F b, F c) { return each<F>([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }
inline F vmax(F a, F b) { return each<F>([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline F vmin(F a, F b) { return each<F>([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline I loadi(const void* p) { I r; std::memcpy(r.v, p, sizeof r.v); return r; }
inline I bcast(const void* p) { int32_t x; std::memcpy(&x, p, 4); return each<I>([=](int) { return x; }); }
inline F to_float(I x) { return each<F>([&](int i) { return static_cast<float>(x.v[i]); }); }
inline void store_int16(int16_t* p, F x) {
  for (int i = 0; i < W; i++) p[i] = static_cast<int16_t>(static_cast<int32_t>(__builtin_rintf(x.v[i])));
}
inline F low(I x) { return each<F>([&](int i) { return as_float(static_cast<uint32_t>(x.v[i]) << 16); }); }
inline F high(I x) { return each<F>([&](int i) { return as_float(static_cast<uint32_t>(x.v[i]) & 0xffff0000u); }); }
inline F round_even(F x) { return each<F>([&](int i) { return __builtin_rintf(x.v[i]); }); }
inline F scale2(F x, F n) {
  return each<F>([&](int i) { return x.v[i] * as_float(static_cast<uint32_t>(static_cast<int>(n.v[i]) + 127) << 23); });
}
inline F load_bf16(const bf16* p) { return each<F>([&](int i) { return as_float(static_cast<uint32_t>(p[i]) << 16); }); }
inline void store_bf16(bf16* p, F x) {
  for (int i = 0; i < W; i++) {
    uint32_t u = as_bits(x.v[i]);
    p[i] = x.v[i] != x.v[i] ? 0x7fc0 : static_cast<bf16>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
  }
}

#endif

// fn(0), ..., fn(N - 1), without a loop where vectors are the compiler's own: it keeps arrays of them in registers only if nothing ever indexes them by
// a variable.
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)  // a sanitizer makes each copy slow to compile
template <int N, class Fn> inline __attribute__((always_inline)) void unrolled(Fn&& fn) {
  [&]<int... i>(std::integer_sequence<int, i...>) __attribute__((always_inline)) { (fn(std::integral_constant<int, i>{}), ...); }
  (std::make_integer_sequence<int, N>{});
}
#else
template <int N, class Fn> inline void unrolled(Fn&& fn) {
  for (int i = 0; i < N; i++) fn(i);
}
#endif

// Sums and maxima over lanes, in one fixed order: halves are folded onto each other.
#if defined(__AVX512F__)
template <class Op> inline float fold(__m512 x, Op op) {
  const __m512 by8 = op(x, _mm512_shuffle_f32x4(x, x, 0x4e)), by4 = op(by8, _mm512_shuffle_f32x4(by8, by8, 0xb1));
  const __m512 by2 = op(by4, _mm512_permute_ps(by4, 0x4e));
  return _mm512_cvtss_f32(op(by2, _mm512_permute_ps(by2, 0xb1)));
}
inline float sum(F x) { return fold(x.v, [](__m512 a, __m512 b) { return _mm512_add_ps(a, b); }); }
inline float top(F x) { return fold(x.v, [](__m512 a, __m512 b) { return _mm512_max_ps(a, b); }); }
// Lanes from .. to - 1 of x, and `other` elsewhere.
inline F within(F x, int from, int to, float other) {
  const auto lanes = [](int n) { return (1u << (n < 0 ? 0 : n > W ? W : n)) - 1u; };
  return {_mm512_mask_mov_ps(_mm512_set1_ps(other), static_cast<__mmask16>(lanes(to) & ~lanes(from)), x.v)};
}
#else
inline float sum(F x) {
  float t[W];
  store(t, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) t[i] += t[i + n];
  return t[0];
}
inline float top(F x) {
  float t[W];
  store(t, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; i++) t[i] = t[i] > t[i + n] ? t[i] : t[i + n];
  return t[0];
}
inline F within(F x, int from, int to, float other) {
  float t[W];
  store(t, x);
  for (int i = 0; i < W; i++) t[i] = i >= from && i < to ? t[i] : other;
  return load(t);
}
#endif

// y where x is `least` or more, 0 elsewhere and where it is no number.
inline F from_on(F x, float least, F y) {
#if defined(__AVX512F__)
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(least), _CMP_GE_OQ), y.v)};
#elif defined(__AVX2__)
  return {_mm256_and_ps(y.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(least), _CMP_GE_OQ))};
#else
  return each<F>([&](int i) { return x.v[i] >= least ? y.v[i] : 0.0f; });
#endif
}

// e**x within 2 units in the last place; from 89 on it is infinity, below -87 it is 0, so that a masked score (-inf) weighs nothing.
// Source: Cephes' expf (minimax polynomial on [-ln2/2, ln2/2] after taking out powers of two).
inline F vexp(F x) {
  const F within = vmin(vmax(x, set1(-88.0f)), set1(89.0f));  // powers of two beyond are no exponents of a float
  F n = round_even(mul(within, set1(1.44269504088896341f)));
  F r = fma(n, set1(-0.693359375f), within);
  r = fma(n, set1(2.12194440e-4f), r);
  F p = set1(1.9875691500e-4f);
  p = fma(p, r, set1(1.3981999507e-3f));
  p = fma(p, r, set1(8.3334519073e-3f));
  p = fma(p, r, set1(4.1665795894e-2f));
  p = fma(p, r, set1(1.6666665459e-1f));
  p = fma(p, r, set1(5.0000001201e-1f));
  F y = add(fma(mul(r, r), p, r), set1(1.0f));
  return from_on(x, -87.0f, scale2(y, vmax(n, set1(-126.0f))));
}

// 2**x for x up to 1; below -126 it is 0, so that a masked score (-inf) weighs nothing. Relative error: 2e-7 for DEGREE 6, 3e-6 for DEGREE 4.
// Minimax polynomials on [-1/2, 1/2] that are 1 at 0.
template <int DEGREE> inline F vexp2(F x) {
  static_assert(DEGREE == 4 || DEGREE == 6);
#if defined(__AVX512F__)
  const F within = x;
#else
  const F within = vmax(x, set1(-127.0f));  // powers of two beyond are no exponents of a float
#endif
  const F n = round_even(within), r = sub(within, n);
  F p;
  if constexpr (DEGREE == 4) {
    p = fma(fma(fma(set1(9.582852945e-3f), r, set1(5.590642616e-2f)), r, set1(2.402409911e-1f)), r, set1(6.931241751e-1f));
  } else {
    p = fma(fma(set1(1.535515476e-4f), r, set1(1.339893555e-3f)), r, set1(9.618429467e-3f));
    p = fma(fma(fma(p, r, set1(5.550332367e-2f)), r, set1(2.402264774e-1f)), r, set1(6.931471825e-1f));
  }
  return from_on(x, -126.0f, scale2(fma(p, r, set1(1.0f)), n));
}

// An element type: how many of K stand beside each other in a packed weight (one multiply-add instruction's worth), and that multiply-add.
struct Bf16 {
  using T = bf16;
  static constexpr int P = 2;
  static F to_float(const T* p) { return load_bf16(p); }
  static void from_float(T* p, F x) { store_bf16(p, x); }
#if defined(__AVX512BF16__)
  // Of weights, which are 0 or no subnormals: the instruction takes those for 0, and rounds the rest alike.
  static void from_weight(T* p, F x) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(x.v)); }
#else
  static void from_weight(T* p, F x) { store_bf16(p, x); }
#endif
  static F weight(F x) { return vexp2<4>(x); }  // far below what rounding to bfloat16 leaves
  static float one(T x) { uint32_t u = static_cast<uint32_t>(x) << 16; float f; std::memcpy(&f, &u, 4); return f; }
};
struct F32 {
  using T = float;
  static constexpr int P = 1;
  static F to_float(const T* p) { return load(p); }
  static void from_float(T* p, F x) { store(p, x); }
  static void from_weight(T* p, F x) { store(p, x); }
  static F weight(F x) { return vexp2<6>(x); }
  static float one(T x) { return x; }
};

// n < W elements at a time: the tail of a row.
template <class E> inline F load_some(const typename E::T* p, int n) {
  typename E::T t[W] = {};
  std::memcpy(t, p, sizeof(typename E::T) * static_cast<size_t>(n));
  return E::to_float(t);
}
template <class E> inline void store_some(typename E::T* p, F x, int n) {
  typename E::T t[W];
  E::from_float(t, x);
  std::memcpy(p, t, sizeof(typename E::T) * static_cast<size_t>(n));
}
template <class E> inline F load_part(const typename E::T* p, int64_t n) {
  return n >= W ? E::to_float(p) : load_some<E>(p, static_cast<int>(n));
}
template <class E> inline void store_part(typename E::T* p, F x, int64_t n) {
  if (n >= W) E::from_float(p, x);
  else store_some<E>(p, x, static_cast<int>(n));
}

#if defined(__AVX512F__)
// 64 bytes of a row; of 8-bit integers 32, each widened to 16 bits.
inline __m512i line_of(const void* p) { return _mm512_loadu_si512(p); }
inline __m512i line_of(const int8_t* p) { return _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }

// Lines of 16 rows, from element `at` on, as 16 numbers of 32 bits each, transposed: out[i][j] = in[j][i].
template <class T> inline __attribute__((always_inline)) void transpose16(const T* const* in, int64_t at, I (&out)[16]) {
  __m512i r[16], t[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) r[i] = line_of(in[i] + at);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]), t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]), r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]), r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88), t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88), t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; i++) {
    out[i].v = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88), out[i + 4].v = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    out[i + 8].v = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd), out[i + 12].v = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Two rows of 32 numbers of 16 bits, element beside element: a0 b0 a1 b1 ...
template <class T> inline __attribute__((always_inline)) void interleave32(const T* a, const T* b, I& low, I& high) {
  const __m512i x = line_of(a), y = line_of(b);
  alignas(64) static const uint16_t FIRST[32] = {0, 32, 1, 33, 2, 34, 3, 35, 4, 36, 5, 37, 6, 38, 7, 39, 8, 40, 9, 41, 10, 42, 11, 43, 12, 44, 13, 45, 14, 46, 15, 47};
  const __m512i order = _mm512_load_si512(FIRST);
  low.v = _mm512_permutex2var_epi16(x, order, y);
  high.v = _mm512_permutex2var_epi16(x, _mm512_add_epi16(order, _mm512_set1_epi16(16)), y);
}

// The same within 128 bits, which takes half as long: `low` gets elements 0-3, 8-11, 16-19, 24-27, `high` the rest. `apart` puts sums of 32 columns
// in that order, `together` puts them back.
template <class T> inline __attribute__((always_inline)) void interleave_lanes(const T* a, const T* b, I& low, I& high) {
  const __m512i x = line_of(a), y = line_of(b);
  low.v = _mm512_unpacklo_epi16(x, y), high.v = _mm512_unpackhi_epi16(x, y);
}
inline void apart(F first, F second, F& low, F& high) {
  low.v = _mm512_shuffle_f32x4(first.v, second.v, 0x88), high.v = _mm512_shuffle_f32x4(first.v, second.v, 0xdd);
}
inline void together(F low, F high, F& first, F& second) {
  const __m512 a = _mm512_shuffle_f32x4(low.v, high.v, 0x44), b = _mm512_shuffle_f32x4(low.v, high.v, 0xee);  // low 0 1, high 0 1; low 2 3, high 2 3
  first.v = _mm512_shuffle_f32x4(a, a, 0xd8), second.v = _mm512_shuffle_f32x4(b, b, 0xd8);
}
#endif

}  // namespace xllm
