// AVX-512 for a processor that has AVX2, so that a sanitizer sees the kernels' AVX-512 code there too: SIMDe's functions under the intrinsics' names,
// and the few that SIMDe lacks. Included before every source; EMULATED_VNNI and EMULATED_BF16 ask for those parts. Slow, and no yardstick of rounding:
// SIMDe's bfloat16 products keep subnormals, which the instruction takes for 0. The kernels' few lines of assembly touch no memory and are left out.
#pragma once

#include <immintrin.h>

#define SIMDE_X86_AVX512F_NO_NATIVE
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx2.h>
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

namespace emulated {

using Floats = simde__m512;
using Integers = simde__m512i;

template <class Out, class In> inline Out bits(const In& x) {
  static_assert(sizeof(Out) == sizeof(In));
  Out y;
  __builtin_memcpy(&y, &x, sizeof y);
  return y;
}
// out[i] = fn(i), for as many elements of T as Out holds.
template <class Out, class T, class Fn> inline Out each(Fn fn) {
  T out[sizeof(Out) / sizeof(T)];
  for (unsigned i = 0; i < sizeof(Out) / sizeof(T); i++) out[i] = fn(i);
  return bits<Out>(out);
}
template <class T, class In> inline T at(const In& x, unsigned i) {
  T t[sizeof(In) / sizeof(T)];
  __builtin_memcpy(t, &x, sizeof x);
  return t[i];
}

inline Floats cvtepi32_ps(Integers x) {
  return each<Floats, float>([&](unsigned i) { return static_cast<float>(at<int>(x, i)); });
}
inline Integers cvtps_epi32(Floats x) {
  __m256 halves[2];
  __builtin_memcpy(halves, &x, sizeof x);
  __m256i whole[2] = {_mm256_cvtps_epi32(halves[0]), _mm256_cvtps_epi32(halves[1])};
  return bits<Integers>(whole);
}
inline __m256i cvtepi32_epi16(Integers x) {
  return each<__m256i, unsigned short>([&](unsigned i) { return static_cast<unsigned short>(at<unsigned>(x, i)); });
}
inline Floats cvtph_ps(__m256i x) {
  __m256 halves[2] = {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
  return bits<Floats>(halves);
}
inline Integers cvtepu16_epi32(__m256i x) {
  return each<Integers, int>([&](unsigned i) { return static_cast<int>(at<unsigned short>(x, i)); });
}
inline __m256i cvtneps_pbh(Floats x) {  // to nearest, ties to even; subnormals are 0
  return each<__m256i, unsigned short>([&](unsigned i) {
    const float value = at<float>(x, i);
    const unsigned u = bits<unsigned>(value);
    if (value != value) return static_cast<unsigned short>(u >> 16 | 64);
    if ((u & 0x7f800000u) == 0) return static_cast<unsigned short>(u >> 16 & 0x8000u);
    return static_cast<unsigned short>((u + 0x7fff + (u >> 16 & 1)) >> 16);
  });
}
inline void stream_ps(float* p, Floats x) {
  if (reinterpret_cast<unsigned long long>(p) % 64 != 0) __builtin_trap();  // as the instruction does
  __builtin_memcpy(p, &x, sizeof x);
}
inline Floats permute_ps(Floats x, unsigned order) {
  return each<Floats, float>([&](unsigned i) { return at<float>(x, i / 4 * 4 + (order >> i % 4 * 2 & 3)); });
}
inline Floats shuffle_f32x4(Floats a, Floats b, unsigned order) {
  return each<Floats, float>([&](unsigned i) { return at<float>(i < 8 ? a : b, (order >> i / 4 * 2 & 3) * 4 + i % 4); });
}

}  // namespace emulated

#undef _mm512_madd_epi16  // SIMDe 0.7 gives its name the arguments of another
#define _mm512_madd_epi16(a, b) simde_mm512_madd_epi16(a, b)
#define _mm512_cvtepi32_ps(x) emulated::cvtepi32_ps(x)
#define _mm512_cvtps_epi32(x) emulated::cvtps_epi32(x)
#define _mm512_cvtepi32_epi16(x) emulated::cvtepi32_epi16(x)
#define _mm512_cvtph_ps(x) emulated::cvtph_ps(x)
#define _mm512_cvtepu16_epi32(x) emulated::cvtepu16_epi32(x)
#define _mm512_cvtneps_pbh(x) emulated::cvtneps_pbh(x)
#define _mm512_cvtss_f32(x) emulated::at<float>(x, 0)
#define _mm512_stream_ps(p, x) emulated::stream_ps(p, x)
#undef _mm512_permute_ps
#define _mm512_permute_ps(x, order) emulated::permute_ps(x, order)
#undef _mm512_shuffle_f32x4
#define _mm512_shuffle_f32x4(a, b, order) emulated::shuffle_f32x4(a, b, order)

#define XLLM_NO_ASM 1
#define __AVX512F__ 1
#ifdef EMULATED_VNNI
#define __AVX512VNNI__ 1
#endif
#ifdef EMULATED_BF16
#define __AVX512BF16__ 1
#endif
