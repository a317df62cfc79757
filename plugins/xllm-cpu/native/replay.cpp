// A step as a list of calls, made once and run by one call from outside. Arguments are those of the first run; of these only the number of rows
// may be another: a graph serves every batch up to the one it was recorded with, and computes no padding.
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "api.h"
#include "kv_ahead.h"

namespace {

template <class T> T argument(uint64_t bits) {
  if constexpr (std::is_pointer_v<T>) {
    return reinterpret_cast<T>(static_cast<uintptr_t>(bits));
  } else if constexpr (std::is_floating_point_v<T>) {
    const auto low = static_cast<uint32_t>(bits);
    T value;
    static_assert(sizeof value == sizeof low);
    std::memcpy(&value, &low, sizeof value);
    return value;
  } else {
    return static_cast<T>(static_cast<int64_t>(bits));
  }
}

template <auto Fn> struct Invoke;
template <class... A, int (*Fn)(A...)> struct Invoke<Fn> {
  static_assert(sizeof...(A) <= XLLM_MAX_ARGUMENTS);
  static int call(const uint64_t* arguments) { return with(arguments, std::index_sequence_for<A...>{}); }
  template <size_t... I> static int with(const uint64_t* arguments, std::index_sequence<I...>) { return Fn(argument<A>(arguments[I])...); }
};

struct Entry {
  const char* name;
  int (*call)(const uint64_t*);
};
#define XLLM_ENTRY(name) {#name, Invoke<xllm_##name>::call}
constexpr Entry ENTRIES[] = {
    XLLM_ENTRY(linear), XLLM_ENTRY(rms_norm), XLLM_ENTRY(add_rms_norm), XLLM_ENTRY(silu_mul), XLLM_ENTRY(embedding), XLLM_ENTRY(rope),
    XLLM_ENTRY(kv_write), XLLM_ENTRY(rope_kv_write), XLLM_ENTRY(attention), XLLM_ENTRY(add), XLLM_ENTRY(experts), XLLM_ENTRY(moe_route), XLLM_ENTRY(widen),
    XLLM_ENTRY(linear_int8), XLLM_ENTRY(linear_blocks), XLLM_ENTRY(packed_rows), XLLM_ENTRY(kv_write_int8), XLLM_ENTRY(rope_kv_write_int8),
};
constexpr int NUM_ENTRIES = static_cast<int>(sizeof ENTRIES / sizeof ENTRIES[0]);

// Says which attention comes next, before the calls that lead to it, and nothing once the replay is over.
class Attentions {
 public:
  Attentions(const XllmCall* calls, int64_t count) : calls_(calls), count_(count) {}
  ~Attentions() { xllm::set_next_attention(nullptr, nullptr, nullptr); }
  void before(int64_t i) {
    if (i <= next_) return;
    static const int attention = xllm_replay_op("attention");
    do next_++;
    while (next_ < count_ && calls_[next_].op != attention);
    if (next_ == count_) return xllm::set_next_attention(nullptr, nullptr, nullptr);
    const uint64_t* of = calls_[next_].arguments;  // step, q, k, v, their steps, out
    xllm::set_next_attention(argument<const XllmAttention*>(of[0]), argument<const void*>(of[2]), argument<const void*>(of[3]));
  }

 private:
  const XllmCall* calls_;
  const int64_t count_;
  int64_t next_ = -1;
};

}  // namespace

int xllm_replay_op(const char* name) {
  for (int i = 0; i < NUM_ENTRIES; i++)
    if (std::strcmp(ENTRIES[i].name, name) == 0) return i;
  return -1;
}

int64_t xllm_replay(const XllmCall* calls, int64_t count, int64_t rows) {
  Attentions attentions(calls, count);
  for (int64_t i = 0; i < count; i++) {
    const XllmCall& call = calls[i];
    if (call.op < 0 || call.op >= NUM_ENTRIES) return i + 1;
    attentions.before(i);
    uint64_t arguments[XLLM_MAX_ARGUMENTS];
    std::memcpy(arguments, call.arguments, sizeof arguments);
    if (call.rows_at >= 0) arguments[call.rows_at] = static_cast<uint64_t>(rows * call.rows_factor);
    if (ENTRIES[call.op].call(arguments) != 0) return i + 1;
  }
  return 0;
}
