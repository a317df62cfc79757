// Products of bytes, four columns beside each other, as the kernels over 8 and 4 bits are made of: unsigned by signed, summed in 32 bits, exact.
#pragma once

#include <bit>

#include "vec.h"

namespace xllm {

constexpr int P = 4;  // columns that one product of a lane takes

// Bytes of four columns, ready to be multiplied.
#if defined(__AVX512VNNI__)
struct Bytes { I v; };
inline Bytes as_signed(I x) { return {x}; }
inline Bytes as_unsigned(I x) { return {x}; }
inline I dot4(I c, Bytes a, Bytes b) { return {_mm512_dpbusd_epi32(c.v, a.v.v, b.v.v)}; }
inline I multiplied(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
#elif defined(__AVX512F__)
struct Bytes { __m512i even, odd; };  // widened to 16 bits: sums of two products of bytes do not fit there, as VPMADDUBSW would have it
inline Bytes as_signed(I x) { return {_mm512_srai_epi16(_mm512_slli_epi16(x.v, 8), 8), _mm512_srai_epi16(x.v, 8)}; }
inline Bytes as_unsigned(I x) { return {_mm512_and_si512(x.v, _mm512_set1_epi16(255)), _mm512_srli_epi16(x.v, 8)}; }
inline I dot4(I c, Bytes a, Bytes b) {
  return {_mm512_add_epi32(_mm512_add_epi32(c.v, _mm512_madd_epi16(a.even, b.even)), _mm512_madd_epi16(a.odd, b.odd))};
}
inline I multiplied(I a, I b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
#elif defined(__AVX2__)
struct Bytes { __m256i even, odd; };
inline Bytes as_signed(I x) { return {_mm256_srai_epi16(_mm256_slli_epi16(x.v, 8), 8), _mm256_srai_epi16(x.v, 8)}; }
inline Bytes as_unsigned(I x) { return {_mm256_and_si256(x.v, _mm256_set1_epi16(255)), _mm256_srli_epi16(x.v, 8)}; }
inline I dot4(I c, Bytes a, Bytes b) {
  return {_mm256_add_epi32(_mm256_add_epi32(c.v, _mm256_madd_epi16(a.even, b.even)), _mm256_madd_epi16(a.odd, b.odd))};
}
inline I multiplied(I a, I b) { return {_mm256_mullo_epi32(a.v, b.v)}; }
#else
struct Bytes { I v; };
inline Bytes as_signed(I x) { return {x}; }
inline Bytes as_unsigned(I x) { return {x}; }
inline I dot4(I c, Bytes a, Bytes b) {
  return each<I>([&](int i) {
    const auto x = static_cast<uint32_t>(a.v.v[i]), y = static_cast<uint32_t>(b.v.v[i]);
    auto total = static_cast<uint32_t>(c.v[i]);
    for (int p = 0; p < 32; p += 8) total += (x >> p & 255) * static_cast<uint32_t>(static_cast<int32_t>(static_cast<int8_t>(y >> p)));
    return static_cast<int32_t>(total);
  });
}
inline I multiplied(I a, I b) {
  return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) * static_cast<uint32_t>(b.v[i])); });
}
#endif

// c = dot4(c, a, b), in place: in a long loop gcc 12 copies every sum around the intrinsic, runs out of registers and takes half as long again.
inline void accumulate4(I& c, Bytes a, Bytes b) {
#if defined(__AVX512VNNI__) && !defined(XLLM_NO_ASM)
  asm("vpdpbusd %2, %1, %0" : "+v"(c.v) : "v"(a.v.v), "v"(b.v.v));
#else
  c = dot4(c, a, b);
#endif
}

inline int32_t bits_of(float x) { return std::bit_cast<int32_t>(x); }

// The last bits are those of the whole number next to x, half to even.
inline float rounded(float x) { return x + 0x1.8p23f; }
inline int32_t whole(float x) { return bits_of(rounded(x)) - bits_of(0x1.8p23f); }

}  // namespace xllm
