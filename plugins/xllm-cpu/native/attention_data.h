// What attention reads and holds: caches of either kind, parts of a result, a thread's buffers, and one layer's call.
//
// A cache of 8-bit codes is not widened to the model's numbers: a query becomes 16-bit integers of a step of its own, and so do its weights over a split, each
// times the step of its position's values. Products with codes are exact in 32 bits, and more precise than bfloat16.
#pragma once

#include "api.h"
#include "gemm.h"

namespace xllm {

// A cache of numbers as the model computes them, by its element type.
template <class E> struct Plain {
  using Element = E;
  using Cached = typename E::T;  // what lies in the cache
  using T = typename E::T;       // what is multiplied
  using Sum = F;
  static constexpr int P = E::P;
  static constexpr bool HAS_STEPS = false;
  static F weight(F x) { return E::weight(x); }
  static void from_weight(T* p, F x) { E::from_weight(p, x); }
};

// A cache of codes and steps.
struct Int8 {
  using Cached = int8_t;
  using T = int16_t;
  using Sum = I;
  static constexpr int P = 2;
  static constexpr bool HAS_STEPS = true;
  static constexpr float MOST = 32767.0f;  // so many times 127 are less than 2**31 for the 256 positions of a split, and for heads of up to 512
  static F weight(F x) { return vexp2<6>(x); }
};

// Partial or whole result of n queries: greatest score, sum of weights, weighted values [n][width]. Numbers of queries are rounded up to whole vectors.
struct State {
  Lines<float> top, total, value;
  void resize(int n, int64_t width) {
    top.resize(static_cast<size_t>(round_up(n, W))), total.resize(static_cast<size_t>(round_up(n, W))), value.resize(static_cast<size_t>(n * width));
  }
};

// A split of a task of some layer, which its keys stand for.
struct Split {
  const void* keys = nullptr;
  const int32_t* task = nullptr;
  int number = 0;
  bool operator==(const Split&) const = default;
};

// Buffers stay with the thread from call to call.
template <class K> struct Buffers {
  Lines<typename K::T> queries, keys, values, weights;
  Lines<typename K::Cached> nothing;
  Lines<float> scores, factors, query_steps, weight_steps, key_steps, value_steps;  // the last two [KV heads of a task][SPLIT]
  State part, whole;
  Split asked;  // was asked for, and comes next most likely
};

// A step's call, with this layer's tensors.
struct Layer : XllmAttention {
  const void *q, *k, *v;
  const float *k_steps, *v_steps;
  void* out;
};

}  // namespace xllm
