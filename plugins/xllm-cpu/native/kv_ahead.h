// Keys and values of the attention that a replay comes to next, asked for while products are computed. Those wait for arithmetic and leave memory idle,
// attention waits for memory: what it reads is in the caches by then.
#pragma once

#include <cstdint>

#include "api.h"

namespace xllm {

struct NextAttention {
  const XllmAttention* step = nullptr;  // null: none is known
  const char *keys = nullptr, *values = nullptr;
  uint64_t number = 0;  // no two have the same
};

// What the calling thread said that its replay comes to next. A job takes it along to the threads that help.
const NextAttention& next_attention();
void set_next_attention(const XllmAttention* step, const void* keys, const void* values);

// Cache lines for one tile to ask for, one with every second step of K, as twice as many would take from the products what they give to attention: runs of
// lines side by side in this thread's part of the keys and values; where there is nothing left to ask for, the beginning of `otherwise`, which is at hand.
// Made before a tile's sums are, so that those stay in registers.
class Runs {
 public:
  static constexpr int64_t LINES = 16, STEPS = 2 * LINES;

  Runs(const NextAttention& next, int64_t steps, const void* otherwise);
  // Where the run of step `k` begins, a multiple of STEPS; many steps of K come to the first runs again.
  const char* operator[](int64_t k) const { return at_[k / STEPS % MOST]; }

 private:
  static constexpr int64_t MOST = 128;
  const char* at_[MOST];
};

}  // namespace xllm
