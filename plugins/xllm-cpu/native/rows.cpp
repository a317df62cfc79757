// What happens to one row at a time: norms, rotation, activation, and moving rows in and out of tables and caches. Bound by memory; a row
// is computed by one thread, so nothing here depends on how many rows there are.
#include <algorithm>
#include <limits>
#include <vector>

#include "api.h"
#include "bytes.h"
#include "linear.h"
#include "pool.h"
#include "vec.h"

namespace xllm {
namespace {

// Back out of panels: a row is one of a panel's lanes, P elements in every step of K.
template <class E> void packed_rows(const int64_t* ids, const typename E::T* packed, typename E::T* out, int64_t count, int64_t size) {
  for_rows(count, size, [=](int64_t i) {
    const auto* from = packed + ids[i] / NR * panel_size<E>(size) + ids[i] % NR * E::P;
    auto* to = out + i * size;
    for (int64_t k = 0; k < size; k++) to[k] = from[k / E::P * NR * E::P + k % E::P];
  });
}

template <class E> float inverse_rms(const typename E::T* x, int64_t size, float eps) {
  F total = zero();
  for (int64_t i = 0; i < size; i += W) {
    const F v = load_part<E>(x + i, size - i);
    total = fma(v, v, total);
  }
  return 1.0f / __builtin_sqrtf(sum(total) / static_cast<float>(size) + eps);
}

template <class E> void scale_row(const typename E::T* x, const typename E::T* weight, float factor, typename E::T* out, int64_t size) {
  for (int64_t i = 0; i < size; i += W) {
    const F v = mul(load_part<E>(x + i, size - i), set1(factor));
    store_part<E>(out + i, mul(v, load_part<E>(weight + i, size - i)), size - i);
  }
}

template <class E>
void rms_norm(
    const typename E::T* x, int64_t ldx, int64_t beside, const typename E::T* weight, float eps, typename E::T* out, int64_t rows, int64_t size) {
  for_rows(rows, size, [=](int64_t row) {
    const auto* from = x + row / beside * ldx + row % beside * size;
    scale_row<E>(from, weight, inverse_rms<E>(from, size, eps), out + row * size, size);
  });
}

template <class E> void add_rows(const typename E::T* a, const typename E::T* b, typename E::T* out, int64_t rows, int64_t size) {
  for_rows(rows, size, [=](int64_t row) {
    for (int64_t i = row * size, end = i + size; i < end; i += W) store_part<E>(out + i, add(load_part<E>(a + i, end - i), load_part<E>(b + i, end - i)), end - i);
  });
}

template <class E>
void add_rms_norm(
    const typename E::T* x, const typename E::T* residual, const typename E::T* weight, float eps, typename E::T* total, typename E::T* out,
    int64_t rows, int64_t size) {
  for_rows(rows, 2 * size, [=](int64_t row) {
    const int64_t at = row * size;
    for (int64_t i = 0; i < size; i += W)
      store_part<E>(total + at + i, add(load_part<E>(residual + at + i, size - i), load_part<E>(x + at + i, size - i)), size - i);
    scale_row<E>(total + at, weight, inverse_rms<E>(total + at, size, eps), out + at, size);
  });
}

template <class E> void silu_mul(const typename E::T* x, int64_t ldx, typename E::T* out, int64_t rows, int64_t inner) {
  for_rows(rows, 4 * inner, [=](int64_t row) {
    const auto *gate = x + row * ldx, *up = gate + inner;
    for (int64_t i = 0; i < inner; i += W) {
      const F g = load_part<E>(gate + i, inner - i);
      const F y = mul(div(g, add(set1(1.0f), vexp(sub(zero(), g)))), load_part<E>(up + i, inner - i));
      store_part<E>(out + row * inner + i, y, inner - i);
    }
  });
}

// One head: half-split pairs (i, i + rotated / 2); what lies behind `rotated` passes.
template <class E>
void rotate(const typename E::T* x, const typename E::T* cos, const typename E::T* sin, typename E::T* out, int64_t size, int64_t rotated) {
  const int64_t half = rotated / 2;
  for (int64_t i = 0; i < half; i += W) {
    const int64_t left = half - i;
    const F a = load_part<E>(x + i, left), b = load_part<E>(x + half + i, left);
    const F first = sub(mul(a, load_part<E>(cos + i, left)), mul(b, load_part<E>(sin + i, left)));
    const F second = add(mul(b, load_part<E>(cos + half + i, left)), mul(a, load_part<E>(sin + half + i, left)));
    store_part<E>(out + i, first, left);
    store_part<E>(out + half + i, second, left);
  }
  if (rotated < size) std::memcpy(out + rotated, x + rotated, sizeof(typename E::T) * static_cast<size_t>(size - rotated));
}

// The numbers of one head as codes; returns their step.
template <class E> float to_codes(const typename E::T* x, int64_t size, int8_t* codes) {
  F most = zero(), test = zero();
  for (int64_t i = 0; i < size; i += W) {
    const F part = load_part<E>(x + i, size - i);
    most = vmax(most, vmax(part, sub(zero(), part))), test = add(test, mul(part, zero()));  // 0 times what is not finite is NaN
  }
  const float span = top(most) + sum(test);
  const bool is_finite = span <= std::numeric_limits<float>::max(), is_zero = span < 0x1p-100f;
  const float factor = !is_finite || is_zero ? 0.0f : 127.0f / span;
  for (int64_t i = 0; i < size; i++) codes[i] = is_finite ? static_cast<int8_t>(whole(E::one(x[i]) * factor)) : int8_t{0};
  return !is_finite ? std::numeric_limits<float>::quiet_NaN() : is_zero ? 0.0f : span / 127.0f;
}

template <class E>
void kv_write_int8(
    const typename E::T* x, int64_t ldx, int8_t* codes, float* steps, const int64_t* slots, int64_t tokens, int64_t heads, int64_t size) {
  for_rows(tokens, 2 * heads * size, [=](int64_t t) {
    for (int64_t h = 0, at = slots[t] * heads; h < heads && at >= 0; h++, at++) steps[at] = to_codes<E>(x + t * ldx + h * size, size, codes + at * size);
  });
}

// Rotated keys are rounded to their type before they become codes, as they are where the two ops are called one after the other.
template <class E>
void rotate_to_codes(
    const typename E::T* x, const typename E::T* cos, const typename E::T* sin, int64_t size, int64_t rotated, int8_t* codes, float* step) {
  thread_local std::vector<typename E::T> kept;
  if (kept.size() < static_cast<size_t>(size)) kept.resize(static_cast<size_t>(size));
  rotate<E>(x, cos, sin, kept.data(), size, rotated);
  *step = to_codes<E>(kept.data(), size, codes);
}

// Where token t's heads go: out + at(t), or nowhere if that is negative.
template <class E, class At>
void rope(
    const typename E::T* x, int64_t ldx, const typename E::T* cos, const typename E::T* sin, typename E::T* out, int64_t tokens, int64_t heads,
    int64_t size, int64_t rotated, At at) {
  for_rows(tokens, 2 * heads * size, [=](int64_t t) {
    const int64_t to = at(t);
    if (to < 0) return;
    for (int64_t h = 0; h < heads; h++) rotate<E>(x + t * ldx + h * size, cos + t * rotated, sin + t * rotated, out + to + h * size, size, rotated);
  });
}

// The 1-based number of the first index outside [low, high), or 0.
int first_outside(const int64_t* index, int64_t count, int64_t low, int64_t high) {
  for (int64_t i = 0; i < count; i++)
    if (index[i] < low || index[i] >= high) return static_cast<int>(i + 1);
  return 0;
}

}  // namespace
}  // namespace xllm

using namespace xllm;

#define BY_TYPE(is_bf16, call_bf16, call_f32) \
  do {                                        \
    if (is_bf16) call_bf16;                   \
    else call_f32;                            \
  } while (0)
#define B(p) static_cast<const bf16*>(p)
#define S(p) static_cast<const float*>(p)
#define BO(p) static_cast<bf16*>(p)
#define SO(p) static_cast<float*>(p)

int xllm_abi() { return XLLM_ABI; }

const char* xllm_isa() {
#if defined(__AVX512BF16__)
  return "avx512_bf16";
#elif defined(__AVX512VNNI__)
  return "avx512_vnni";
#elif defined(__AVX512F__)
  return "avx512";
#elif defined(__AVX2__)
  return "avx2";
#else
  return "portable";
#endif
}

void xllm_set_threads(int count) { set_num_threads(count); }
int xllm_threads() { return num_threads(); }

int xllm_rms_norm(
    const void* x, int64_t ldx, int64_t beside, const void* weight, float eps, void* out, int64_t rows, int64_t size, int is_bf16) {
  BY_TYPE(
      is_bf16, rms_norm<Bf16>(B(x), ldx, beside, B(weight), eps, BO(out), rows, size),
      rms_norm<F32>(S(x), ldx, beside, S(weight), eps, SO(out), rows, size));
  return 0;
}

int xllm_add_rms_norm(
    const void* x, const void* residual, const void* weight, float eps, void* total, void* out, int64_t rows, int64_t size, int is_bf16) {
  BY_TYPE(
      is_bf16, add_rms_norm<Bf16>(B(x), B(residual), B(weight), eps, BO(total), BO(out), rows, size),
      add_rms_norm<F32>(S(x), S(residual), S(weight), eps, SO(total), SO(out), rows, size));
  return 0;
}

int xllm_silu_mul(const void* x, int64_t ldx, void* out, int64_t rows, int64_t inner, int is_bf16) {
  BY_TYPE(is_bf16, silu_mul<Bf16>(B(x), ldx, BO(out), rows, inner), silu_mul<F32>(S(x), ldx, SO(out), rows, inner));
  return 0;
}

int xllm_embedding(const int64_t* ids, const void* table, void* out, int64_t count, int64_t vocab, int64_t size, int is_bf16) {
  if (const int bad = first_outside(ids, count, 0, vocab)) return bad;
  const int64_t bytes = size * (is_bf16 ? 2 : 4);
  for_rows(count, size, [=](int64_t i) {
    std::memcpy(static_cast<char*>(out) + i * bytes, static_cast<const char*>(table) + ids[i] * bytes, static_cast<size_t>(bytes));
  });
  return 0;
}

int xllm_packed_rows(const int64_t* ids, const void* packed, void* out, int64_t count, int64_t vocab, int64_t size, int is_bf16) {
  if (const int bad = first_outside(ids, count, 0, vocab)) return bad;
  BY_TYPE(is_bf16, packed_rows<Bf16>(ids, B(packed), BO(out), count, size), packed_rows<F32>(ids, S(packed), SO(out), count, size));
  return 0;
}

int xllm_rope(
    const void* x, int64_t ldx, const void* cos, const void* sin, void* out, int64_t tokens, int64_t heads, int64_t size, int64_t rotated, int is_bf16) {
  const auto at = [=](int64_t t) { return t * heads * size; };
  BY_TYPE(
      is_bf16, rope<Bf16>(B(x), ldx, B(cos), B(sin), BO(out), tokens, heads, size, rotated, at),
      rope<F32>(S(x), ldx, S(cos), S(sin), SO(out), tokens, heads, size, rotated, at));
  return 0;
}

int xllm_rope_kv_write(
    const void* q, const void* k, const void* v, int64_t ldq, int64_t ldk, int64_t ldv, const void* cos, const void* sin, void* out, void* keys,
    void* values, const int64_t* slots, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size, int64_t value_size, int64_t rotated,
    int64_t num_slots, int is_bf16) {
  if (const int bad = first_outside(slots, tokens, -1, num_slots)) return bad;
  const int64_t bytes = is_bf16 ? 2 : 4;
  for_rows(tokens, 2 * (heads + kv_heads) * size, [=](int64_t t) {
    const auto heads_of = [=](const void* from, int64_t ld, void* to, int64_t at, int64_t count) {
      for (int64_t h = 0; h < count; h++) {
        const int64_t x = t * ld + h * size, y = at + h * size;
        if (is_bf16) rotate<Bf16>(B(from) + x, B(cos) + t * rotated, B(sin) + t * rotated, BO(to) + y, size, rotated);
        else rotate<F32>(S(from) + x, S(cos) + t * rotated, S(sin) + t * rotated, SO(to) + y, size, rotated);
      }
    };
    heads_of(q, ldq, out, t * heads * size, heads);
    if (slots[t] < 0) return;
    heads_of(k, ldk, keys, slots[t] * kv_heads * size, kv_heads);
    std::memcpy(
        static_cast<char*>(values) + slots[t] * value_size * bytes, static_cast<const char*>(v) + t * ldv * bytes, static_cast<size_t>(value_size * bytes));
  });
  return 0;
}

int xllm_kv_write(const void* x, int64_t ldx, void* cache, const int64_t* slots, int64_t tokens, int64_t num_slots, int64_t size, int64_t bytes) {
  if (const int bad = first_outside(slots, tokens, -1, num_slots)) return bad;
  for_rows(tokens, size, [=](int64_t t) {
    if (slots[t] < 0) return;
    std::memcpy(static_cast<char*>(cache) + slots[t] * size * bytes, static_cast<const char*>(x) + t * ldx * bytes, static_cast<size_t>(size * bytes));
  });
  return 0;
}

int xllm_kv_write_int8(
    const void* x, int64_t ldx, int8_t* codes, float* steps, const int64_t* slots, int64_t tokens, int64_t num_slots, int64_t heads, int64_t size, int is_bf16) {
  if (const int bad = first_outside(slots, tokens, -1, num_slots)) return bad;
  BY_TYPE(
      is_bf16, kv_write_int8<Bf16>(B(x), ldx, codes, steps, slots, tokens, heads, size), kv_write_int8<F32>(S(x), ldx, codes, steps, slots, tokens, heads, size));
  return 0;
}

int xllm_rope_kv_write_int8(
    const void* q, const void* k, const void* v, int64_t ldq, int64_t ldk, int64_t ldv, const void* cos, const void* sin, void* out, int8_t* keys,
    int8_t* values, float* key_steps, float* value_steps, const int64_t* slots, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t size,
    int64_t rotated, int64_t num_slots, int is_bf16) {
  if (const int bad = first_outside(slots, tokens, -1, num_slots)) return bad;
  const auto write = [=]<class E>(E) {
    using T = typename E::T;
    for_rows(tokens, 2 * (heads + 2 * kv_heads) * size, [=](int64_t t) {
      const T *c = static_cast<const T*>(cos) + t * rotated, *s = static_cast<const T*>(sin) + t * rotated;
      const T *query = static_cast<const T*>(q) + t * ldq, *key = static_cast<const T*>(k) + t * ldk, *value = static_cast<const T*>(v) + t * ldv;
      for (int64_t h = 0; h < heads; h++) rotate<E>(query + h * size, c, s, static_cast<T*>(out) + (t * heads + h) * size, size, rotated);
      for (int64_t h = 0, at = slots[t] * kv_heads; h < kv_heads && at >= 0; h++, at++) {
        rotate_to_codes<E>(key + h * size, c, s, size, rotated, keys + at * size, key_steps + at);
        value_steps[at] = to_codes<E>(value + h * size, size, values + at * size);
      }
    });
  };
  BY_TYPE(is_bf16, write(Bf16{}), write(F32{}));
  return 0;
}

void xllm_populate(void* memory, int64_t num_bytes) {
  constexpr int64_t PAGE = 4096;
  auto* bytes = static_cast<unsigned char*>(memory);
  for (int64_t at = 0; at < num_bytes; at += PAGE - static_cast<int64_t>((reinterpret_cast<uintptr_t>(bytes) + static_cast<uintptr_t>(at)) % PAGE))
    __atomic_fetch_or(bytes + at, static_cast<unsigned char>(0), __ATOMIC_RELAXED);
}

// All sources are read into `buffer` [count][block_bytes] before any destination is written.
int xllm_block_copy(void* cache, const int64_t* from, const int64_t* to, int64_t count, int64_t num_blocks, int64_t block_bytes, void* buffer) {
  if (const int bad = first_outside(from, count, 0, num_blocks)) return bad;
  if (const int bad = first_outside(to, count, 0, num_blocks)) return bad;
  auto *blocks = static_cast<char*>(cache), *kept = static_cast<char*>(buffer);
  const auto size = static_cast<size_t>(block_bytes);
  parallel_for(count, [=](int64_t i) { std::memcpy(kept + i * block_bytes, blocks + from[i] * block_bytes, size); });
  parallel_for(count, [=](int64_t i) { std::memcpy(blocks + to[i] * block_bytes, kept + i * block_bytes, size); });
  return 0;
}

int xllm_widen(const void* x, int64_t ldx, float* out, int64_t rows, int64_t size) {
  for_rows(rows, size, [=](int64_t row) {
    const bf16* from = B(x) + row * ldx;
    for (int64_t i = 0; i < size; i += W) store_part<F32>(out + row * size + i, load_part<Bf16>(from + i, size - i), size - i);
  });
  return 0;
}

int xllm_add(const void* a, const void* b, void* out, int64_t rows, int64_t size, int is_bf16) {
  if (is_bf16) add_rows<Bf16>(static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<bf16*>(out), rows, size);
  else add_rows<F32>(static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(out), rows, size);
  return 0;
}
