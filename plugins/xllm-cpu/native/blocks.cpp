// Linear maps over integers of 4 or 8 bits in blocks of 32 columns, as GGUF files hold them: a scale per block, for some kinds a minimum, and a
// step per block of 32 elements of x. Sums within a block are exact in 32 bits; blocks are then added in float32, in order, product and sum
// rounded each by itself. So every instruction set and any number of rows give the same results; `contracts/ops.py` of the core defines them.
//
// VPDPBUSD multiplies unsigned by signed. The weight is the unsigned one: codes are stored with an offset (0, 8 or 128), and each sum starts at
// minus the offset times the sum of x's block.
//
// A panel is, block after block, [NR] half precision scales, [NR] minimums where the kind has them, then codes: with 8 bits [8][NR][4]; with 4 bits
// [4][NR][4] bytes, of which the low halves are four columns and the high halves the next four, so that one load gives two operands.
//
// Limits. Few rows: bytes over the bandwidth of memory, the file's own 5 bits a weight for Q4_1. Many rows: per block and vector 8 products of bytes
// beside 5 or 7 operations in float32, two thirds of VPDPBUSD's peak.
#include <cstddef>

#include "api.h"
#include "bytes.h"
#include "linear.h"
#include "pool.h"

namespace xllm {
namespace {

constexpr int BLOCK = 32;  // columns
constexpr int HALF = sizeof(uint16_t);

struct Kind {
  bool is_4_bit, has_minimums;
  int64_t code_bytes() const { return (is_4_bit ? BLOCK / 2 : BLOCK) * NR; }
  int64_t block_bytes() const { return (has_minimums ? 2 : 1) * NR * HALF + code_bytes(); }
  int64_t panel_bytes(int64_t k) const { return k / BLOCK * block_bytes(); }
  // What is added to a code of the format when it is stored: 4-bit codes come unsigned, and stand for themselves only beside a minimum.
  int32_t offset() const { return is_4_bit ? (has_minimums ? 0 : 8) : 128; }
};

// Half precision to float, exactly.
#if defined(__AVX512F__)
inline F load_half(const char* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
#elif defined(__AVX2__)
inline F load_half(const char* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
#else
inline F load_half(const char* p) {
  return each<F>([&](int i) {
    uint16_t h;
    std::memcpy(&h, p + i * HALF, sizeof h);
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16, rest = h & 0x7fff;
    if (rest < 0x400) return (sign != 0 ? -1.0f : 1.0f) * static_cast<float>(rest) * 0x1p-24f;
    return as_float(sign | (rest < 0x7c00 ? (rest << 13) + (112u << 23) : rest << 13 | 0x7f800000u));
  });
}
#endif

// With few rows the weight comes from memory, once: it is asked for so many bytes ahead.
constexpr int AHEAD = 7680;
#if defined(__AVX2__)
inline void prefetch(const char* p) { _mm_prefetch(p, _MM_HINT_T0); }
#else
inline void prefetch(const char*) {}
#endif

// The low and the high halves of bytes.
#if defined(__AVX512F__)
inline I low_half(I x) { return {_mm512_and_si512(x.v, _mm512_set1_epi8(15))}; }
inline I high_half(I x) { return {_mm512_and_si512(_mm512_srli_epi16(x.v, 4), _mm512_set1_epi8(15))}; }
#elif defined(__AVX2__)
inline I low_half(I x) { return {_mm256_and_si256(x.v, _mm256_set1_epi8(15))}; }
inline I high_half(I x) { return {_mm256_and_si256(_mm256_srli_epi16(x.v, 4), _mm256_set1_epi8(15))}; }
#else
inline I low_half(I x) { return each<I>([&](int i) { return x.v[i] & 0x0f0f0f0f; }); }
inline I high_half(I x) { return each<I>([&](int i) { return static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) >> 4 & 0x0f0f0f0fu); }); }
#endif

// The codes of a block [32] or [16], four columns a word, to every NR-th word. Bytes of a word are kept apart by masks, so their order does not matter.
inline void pack_codes(const uint8_t* from, bool is_4_bit, char* to) {
  constexpr uint32_t LOW = 0x0f0f0f0f;
  uint32_t words[BLOCK / P], out[BLOCK / P];
  const int count = (is_4_bit ? BLOCK / 2 : BLOCK) / P;
  std::memcpy(words, from, static_cast<size_t>(count) * P);
  if (is_4_bit) {  // columns 0 .. 15 are the low halves of 16 bytes, 16 .. 31 the high ones
    for (int i = 0; i < 2; i++) {
      const uint32_t first = words[2 * i], second = words[2 * i + 1];
      out[i] = (first & LOW) | (second & LOW) << 4, out[2 + i] = (first >> 4 & LOW) | (second & ~LOW);
    }
  } else {
    for (int i = 0; i < count; i++) out[i] = words[i] ^ 0x80808080u;
  }
  for (int i = 0; i < count; i++) std::memcpy(to + i * NR * P, out + i, P);
}

void pack(const uint8_t* codes, const uint16_t* scales, const uint16_t* minimums, int64_t n, int64_t k, Kind kind, bool fuses, char* out) {
  const int64_t num_blocks = k / BLOCK, bytes = kind.code_bytes() / NR;
  parallel_for(num_panels(n, fuses), [&](int64_t panel) {
    for (int lane = 0; lane < NR; lane++) {
      const int64_t row = source_row(panel, lane, n, fuses);
      char* to = out + panel * kind.panel_bytes(k);
      for (int64_t block = 0; block < num_blocks; block++, to += kind.block_bytes()) {
        const uint8_t nothing[BLOCK] = {};  // whatever it stands for, its scale is 0
        const uint16_t none = 0;
        const int64_t at = row * num_blocks + block;
        std::memcpy(to + lane * HALF, row >= 0 ? scales + at : &none, HALF);
        if (kind.has_minimums) std::memcpy(to + (NR + lane) * HALF, row >= 0 ? minimums + at : &none, HALF);
        pack_codes(row >= 0 ? codes + at * bytes : nothing, kind.is_4_bit, to + kind.block_bytes() - kind.code_bytes() + lane * P);
      }
    }
  });
}

// 32 elements of a row of x.
struct RowBlock {
  int8_t values[BLOCK];
  float step, scaled_sum;  // step of x; step times the sum of the values
  int32_t start;           // minus the offset of the codes times that sum
  int32_t unused;
};

// Plain loops over 32, which compilers turn into vectors. Magnitudes are compared by their bits: those of what is not finite are the largest.
template <class E> void to_block(const typename E::T* x, int32_t offset, RowBlock* to) {
  constexpr int32_t INFINITE = 0x7f800000;
  int32_t most = 0, values[BLOCK], total = 0;
  for (int i = 0; i < BLOCK; i++) {
    const int32_t magnitude = bits_of(E::one(x[i])) & 0x7fffffff;
    most = magnitude > most ? magnitude : most;
  }
  const bool is_finite = most < INFINITE;
  const float span = is_finite ? std::bit_cast<float>(most) : 0.0f;
  const float factor = span < 0x1p-100f ? 0.0f : 127.0f / span;
  for (int i = 0; i < BLOCK; i++) values[i] = is_finite ? whole(E::one(x[i]) * factor) : 0;
  for (int i = 0; i < BLOCK; i++) total += values[i];
  for (int i = 0; i < BLOCK; i++) to->values[i] = static_cast<int8_t>(values[i]);
  to->step = !is_finite ? __builtin_nanf("") : span < 0x1p-100f ? 0.0f : span / 127.0f;
  to->scaled_sum = to->step * static_cast<float>(total);
  to->start = -offset * total;
  to->unused = 0;
}

template <bool IS_4_BIT> struct Product {
  static constexpr int STEPS = (IS_4_BIT ? BLOCK / 2 : BLOCK) / P;
  const RowBlock* rows;
  const char* packed;
  int64_t num_blocks;
  Kind kind;

  // MR rows by one panel. Not a part of what stores, so that it is compiled once for all kinds of results.
  template <int MR> __attribute__((noinline)) void tile(int64_t row, int64_t panel, F (&out)[MR][2]) const {
    const RowBlock* a = rows + row * num_blocks;
    const int64_t block_bytes = kind.block_bytes(), head_bytes = block_bytes - kind.code_bytes();
    const char* b = packed + panel * num_blocks * block_bytes;
    F c[MR][2];
    unrolled<MR>([&](auto i) { c[i][0] = c[i][1] = zero(); });
    for (int64_t block = 0; block < num_blocks; block++, a++, b += block_bytes) {
      if (MR <= FEW_ROWS) prefetch(b + AHEAD), prefetch(b + AHEAD + head_bytes - 64);
      I d[MR][2];
      sums<MR>(a, b + head_bytes, d);
      const F s0 = load_half(b), s1 = load_half(b + W * HALF);
      F t[MR][2];
      unrolled<MR>([&](auto i) {
        const F step = set1(a[i * num_blocks].step);
        t[i][0] = mul(to_float(d[i][0]), mul(step, s0)), t[i][1] = mul(to_float(d[i][1]), mul(step, s1));
      });
      if (kind.has_minimums) {
        const F m0 = load_half(b + NR * HALF), m1 = load_half(b + (NR + W) * HALF);
        unrolled<MR>([&](auto i) {
          const F total = set1(a[i * num_blocks].scaled_sum);
          t[i][0] = add(t[i][0], mul(total, m0)), t[i][1] = add(t[i][1], mul(total, m1));
        });
      }
      unrolled<MR>([&](auto i) { c[i][0] = add(c[i][0], t[i][0]), c[i][1] = add(c[i][1], t[i][1]); });
    }
    unrolled<MR>([&](auto i) { out[i][0] = c[i][0], out[i][1] = c[i][1]; });
  }

  // Sums of one block, of codes as they are meant.
  template <int MR> inline __attribute__((always_inline)) void sums(const RowBlock* a, const char* codes, I (&d)[MR][2]) const {
    unrolled<MR>([&](auto i) { d[i][0] = d[i][1] = bcast(&a[i * num_blocks].start); });
    unrolled<STEPS>([&](auto step) {
      if (MR <= FEW_ROWS) prefetch(codes + AHEAD + step * NR * P), prefetch(codes + AHEAD + step * NR * P + (NR * P > 64 ? 64 : 0));
      const I b0 = loadi(codes + step * NR * P), b1 = loadi(codes + (step * NR + W) * P);
      const auto multiply = [&](int at, Bytes w0, Bytes w1) {
        unrolled<MR>([&](auto i) {
          const Bytes x = as_signed(bcast(a[i * num_blocks].values + at * P));
          d[i][0] = dot4(d[i][0], w0, x), d[i][1] = dot4(d[i][1], w1, x);
        });
      };
      if constexpr (IS_4_BIT) {
        multiply(2 * step, as_unsigned(low_half(b0)), as_unsigned(low_half(b1)));
        multiply(2 * step + 1, as_unsigned(high_half(b0)), as_unsigned(high_half(b1)));
      } else {
        multiply(step, as_unsigned(b0), as_unsigned(b1));
      }
    });
  }
};

template <class E, bool IS_4_BIT> struct BlocksCall {
  static constexpr int MOST_ROWS = 6;  // sums of a block and of a row stay in registers, 24 of 32
  Product<IS_4_BIT> product;
  Output<E> to;

  template <int MR> void tile(int64_t row, int64_t panel, int64_t at, int64_t count) const {
    if constexpr (MR > MOST_ROWS) {
      tile<MR / 2>(row, panel, at, count);
      tile<MR - MR / 2>(row + MR / 2, panel, at, count);
    } else {
      F c[MR][2];
      product.template tile<MR>(row, panel, c);
      for (int i = 0; i < MR; i++) to.store(row + i, panel, c[i][0], c[i][1]);
    }
  }
};

struct Shape {
  int64_t m, n, k, ldx, ldo;
  bool fuses, is_wide;
};

template <class E>
void run(const void* x, const void* packed, const float* bias, void* out, void* room, const Shape& of, Kind kind) {
  const int64_t num_blocks = of.k / BLOCK;
  auto* rows = static_cast<RowBlock*>(room);
  constexpr int64_t FEW = 1 << 15;  // elements that one thread turns into bytes sooner than it could ask another
  const int64_t grain = of.k < FEW ? FEW / (of.k > 0 ? of.k : 1) : 1;
  parallel_for((of.m + grain - 1) / grain, [&](int64_t piece) {
    for (int64_t i = piece * grain; i < of.m && i < (piece + 1) * grain; i++)
      for (int64_t block = 0; block < num_blocks; block++)
        to_block<E>(static_cast<const typename E::T*>(x) + i * of.ldx + block * BLOCK, kind.offset(), rows + i * num_blocks + block);
  });
  const auto multiply = [&]<bool IS_4_BIT>() {
    const Product<IS_4_BIT> product{rows, static_cast<const char*>(packed), num_blocks, kind};
    const bool is_streamed = streams(out, of.m, of.n, of.ldo, of.is_wide);
    const BlocksCall<E, IS_4_BIT> tiles{product, {bias, out, of.n, of.ldo, of.fuses, of.is_wide, is_streamed}};
    run_tiles(tiles, of.m, num_panels(of.n, of.fuses), is_streamed);
  };
  if (kind.is_4_bit) multiply.template operator()<true>();
  else multiply.template operator()<false>();
}

}  // namespace
}  // namespace xllm

using namespace xllm;

int64_t xllm_blocks_bytes(int64_t n, int64_t k, int is_4_bit, int has_minimums, int fuses) {
  return num_panels(n, fuses != 0) * Kind{is_4_bit != 0, has_minimums != 0}.panel_bytes(k);
}

int64_t xllm_blocks_room(int64_t k) { return k / BLOCK * static_cast<int64_t>(sizeof(RowBlock)); }

int xllm_pack_blocks(const void* codes, const uint16_t* scales, const uint16_t* minimums, int64_t n, int64_t k, int is_4_bit, int fuses, void* out) {
  pack(static_cast<const uint8_t*>(codes), scales, minimums, n, k, {is_4_bit != 0, minimums != nullptr}, fuses != 0, static_cast<char*>(out));
  return 0;
}

int xllm_linear_blocks(
    const void* x, const void* packed, const float* bias, void* out, void* room, int64_t m, int64_t n, int64_t k, int64_t ldx, int64_t ldo, int is_bf16,
    int is_4_bit, int has_minimums, int fuses, int is_wide) {
  const auto call = is_bf16 != 0 ? run<Bf16> : run<F32>;
  call(x, packed, bias, out, room, {m, n, k, ldx, ldo, fuses != 0, is_wide != 0}, {is_4_bit != 0, has_minimums != 0});
  return 0;
}
