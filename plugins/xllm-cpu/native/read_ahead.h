// What a loop is going to read, where neither the processor nor a pattern could tell.
#pragma once

#include <cstdint>

#include "vec.h"

namespace xllm {

// Keys and values that are read next, asked for a line at a time between the instructions of what is computed now. Memory gives a line in the time of ten
// or so of these: asked for faster, by the position or by the hundred, many would be dropped, and each would be waited for later.
template <int MOST> class ReadAhead {
 public:
  void begin() { count_ = next_ = 0, left_ = 0; }
  // What is read after that which was added before: `rows` times `bytes`, `stride` apart. MOST rows in all.
  void add(const void* start, int64_t bytes, int64_t stride, int64_t rows) {
#if defined(__AVX2__)
    const char* at = static_cast<const char*>(start);
    if (stride == bytes) runs_[count_++] = {at, bytes * rows};
    else
      for (int64_t i = 0; i < rows; i++) runs_[count_++] = {at + i * stride, bytes};
#else
    (void)start, (void)bytes, (void)stride, (void)rows;  // nothing to ask for it with
#endif
  }
  bool has_more() const { return left_ > 0 || next_ < count_; }
  inline __attribute__((always_inline)) void fetch() {
#if defined(__AVX2__)
    if (left_ <= 0) {
      if (next_ == count_) return;
      at_ = runs_[next_].at, left_ = runs_[next_].bytes, next_++;
    }
    _mm_prefetch(at_, _MM_HINT_T1);
    at_ += 64, left_ -= 64;
#endif
  }
  void fetch(int64_t bytes) {
    for (; bytes > 0; bytes -= 64) fetch();
  }

 private:
  struct Run {
    const char* at;
    int64_t bytes;
  };
  Run runs_[MOST];
  int count_ = 0, next_ = 0;
  int64_t left_ = 0;
  const char* at_ = nullptr;
};

}  // namespace xllm
