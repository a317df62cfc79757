#include "kv_ahead.h"

#include <algorithm>
#include <atomic>

#include "pool.h"

namespace xllm {
namespace {

constexpr int64_t RUN_BYTES = Runs::LINES * 64;
constexpr int64_t MOST_BYTES = 3 << 20;  // asked for by a thread: with more, what came first would be gone from its share of the caches

// One thread's part: the blocks of the tasks that it is going to have, those that it takes first asked for last, as they are found in its own cache then.
class Part {
 public:
  const char* next_run(const NextAttention& next) {
    if (next.number != number_) begin(next);
    if (left_ <= 0 && !next_block(next)) return nullptr;
    const char* run = at_;
    at_ += RUN_BYTES, left_ -= RUN_BYTES;
    return run;
  }

 private:
  void begin(const NextAttention& next) {
    number_ = next.number, left_ = block_ = 0, is_value_ = false;
    const bool is_whole = next.step != nullptr && next.step->window == 0;
    const int64_t count = is_whole ? next.step->num_tasks : 0, past = count * (thread_index() + 1) / num_threads();
    first_ = task_ = count * thread_index() / num_threads();
    for (int64_t asked = 0; task_ < past && asked < MOST_BYTES; task_++)
      asked += 2 * bytes_of_position(*next.step) * next.step->kv_lens[next.step->tasks[3 * task_]];
  }

  bool next_block(const NextAttention& next) {
    for (; task_ > first_; task_--, block_ = 0) {
      const XllmAttention& step = *next.step;
      const int32_t *task = step.tasks + 3 * (task_ - 1), row = task[0];
      const int64_t left = step.kv_lens[row] - block_ * step.block_size;
      if (left <= 0 || task[1] >= 0) continue;  // tasks of one head are of long prompts or few rows
      const int64_t block = step.tables[row * step.table_width + block_];
      at_ = (is_value_ ? next.values : next.keys) + block * step.block_size * bytes_of_position(step);
      left_ = std::min<int64_t>(step.block_size, left) * bytes_of_position(step);
      block_ += is_value_ ? 1 : 0;
      is_value_ = !is_value_;
      return true;
    }
    return false;
  }

  static int64_t bytes_of_position(const XllmAttention& step) {
    return static_cast<int64_t>(step.num_kv_heads) * step.head_size * (step.is_int8 != 0 ? 1 : step.is_bf16 != 0 ? 2 : 4);
  }

  uint64_t number_ = 0;
  const char* at_ = nullptr;
  int64_t left_ = 0, block_ = 0, task_ = 0, first_ = 0;
  bool is_value_ = false;
};

thread_local NextAttention told;
thread_local Part part;

}  // namespace

const NextAttention& next_attention() { return told; }

void set_next_attention(const XllmAttention* step, const void* keys, const void* values) {
  static std::atomic<uint64_t> count{0};
  told = {step, static_cast<const char*>(keys), static_cast<const char*>(values), count.fetch_add(1) + 1};
}

Runs::Runs(const NextAttention& next, int64_t steps, const void* otherwise) {
  const int64_t count = std::min(MOST, (steps + STEPS - 1) / STEPS);
  for (int64_t i = 0; i < count; i++) {
    const char* run = next.step != nullptr ? part.next_run(next) : nullptr;
    at_[i] = run != nullptr ? run : static_cast<const char*>(otherwise);
  }
}

}  // namespace xllm
