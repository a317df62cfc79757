// Attention of one layer: its tasks shared out among threads. What a thread does with one stands in `attention_worker.h`.
#include <algorithm>
#include <vector>

#include "api.h"
#include "attention_worker.h"
#include "pool.h"

namespace xllm {
namespace {

template <class K, class Fn> void with_worker(const Layer& call, Fn fn) {
  thread_local Buffers<K> kept;
  Worker<K> worker(call, kept);
  fn(worker);
}

template <class K> void run_tasks(const Layer& call) {
  const bool is_decode = call.num_tasks > 0 && call.tasks[1] == ALL && call.tasks[3 * call.num_tasks - 2] == ALL;
  const int64_t grain = std::max<int64_t>(1, call.num_tasks / ((is_decode ? 8 : 16) * num_threads()));
  parallel_for((call.num_tasks + grain - 1) / grain, [&](int64_t piece) {
    with_worker<K>(call, [&](Worker<K>& worker) {
      const int64_t end = std::min<int64_t>(call.num_tasks, (piece + 1) * grain);
      for (int64_t i = piece * grain; i < end; i++) {
        const int32_t *task = call.tasks + 3 * i, *next = i + 1 < call.num_tasks ? task + 3 : nullptr;  // in the next piece too, which most often is this thread's
        worker.run(task, next != nullptr && task[1] == ALL && next[1] == ALL ? next : nullptr);
      }
    });
  });
}

// Fewer tasks than threads could share, and long contexts: splits are computed apart, then merged in the same order with the same arithmetic.
template <class K> void run_splits(const Layer& call) {
  const int64_t splits = (call.max_kv_len + SPLIT - 1) / SPLIT;
  std::vector<State> parts(static_cast<size_t>(call.num_tasks * splits));
  parallel_for(call.num_tasks * splits, [&](int64_t piece) {
    with_worker<K>(call, [&](Worker<K>& worker) {
      worker.take(call.tasks + 3 * (piece / splits));
      const int split = static_cast<int>(piece % splits);
      if (split < worker.first_split() || split >= worker.num_splits()) return;
      const int64_t next = piece + 1;
      worker.run_split(split, next < call.num_tasks * splits ? call.tasks + 3 * (next / splits) : nullptr, static_cast<int>(next % splits));
      std::swap(parts[static_cast<size_t>(piece)], worker.part);
    });
  });
  parallel_for(call.num_tasks, [&](int64_t task) {
    with_worker<K>(call, [&](Worker<K>& worker) {
      worker.take(call.tasks + 3 * task);
      const int first = worker.first_split();
      for (int split = first; split < worker.num_splits(); split++) {
        State& part = parts[static_cast<size_t>(task * splits + split)];
        if (split == first) std::swap(worker.whole, part);
        else worker.merge(part);
      }
      worker.write();
    });
  });
}

template <class K> void run(const Layer& call) {
  const bool is_short_of_tasks = call.num_tasks < 4 * num_threads() && call.max_kv_len > SPLIT && num_threads() > 1;
  is_short_of_tasks ? run_splits<K>(call) : run_tasks<K>(call);
}

// Lay out tasks, and count them.
int64_t lay_out_tasks(const XllmAttention& step) {
  const int group = step.num_heads / step.num_kv_heads;
  int64_t count = 0, num_splits = 0;
  for (int32_t row = 0; row < step.num_rows; row++) num_splits += (step.kv_lens[row] + SPLIT - 1) / SPLIT;
  const bool is_shared = step.num_rows >= 4 * num_threads() || num_splits >= 8 * num_threads();  // among threads, without taking heads apart
  auto add = [&](int32_t row, int32_t head, int32_t token) {
    step.tasks[3 * count] = row, step.tasks[3 * count + 1] = head, step.tasks[3 * count + 2] = token;
    count++;
  };
  for (int32_t row = step.num_rows - 1; row >= 0; row--) {  // later rows are prompts more often than not: long tasks first
    const int32_t begin = step.query_starts[row], num_tokens = step.query_starts[row + 1] - begin, each = tokens_per_task(group);
    if (num_tokens > 0 && num_tokens <= tokens_of_all(group) && is_shared) {
      add(row, ALL, begin);
      continue;
    }
    for (int32_t t = begin + num_tokens - 1 - (num_tokens - 1) % each; num_tokens > 0 && t >= begin; t -= each)
      for (int32_t head = 0; head < step.num_kv_heads; head++) add(row, head, t);
  }
  return count;
}

}  // namespace
}  // namespace xllm

using namespace xllm;

int64_t xllm_attention_lay_out(
    XllmAttention* step, const int32_t* query_starts, const int32_t* kv_lens, const int32_t* tables, int64_t num_rows, int64_t width, int64_t max_rows,
    int64_t max_tokens, int is_decode) {
  constexpr int64_t UNFIT = -2, HOLE = -3;
  if (num_rows > max_rows || width > step->table_width || query_starts[0] != 0 || query_starts[num_rows] > max_tokens) return UNFIT;
  int32_t longest = 0;
  for (int64_t row = 0; row < num_rows; row++) {
    const int64_t num_new = static_cast<int64_t>(query_starts[row + 1]) - query_starts[row];
    if (num_new < 0 || num_new > kv_lens[row] || kv_lens[row] > width * step->block_size || (is_decode != 0 && num_new != 1)) return UNFIT;
    longest = std::max(longest, kv_lens[row]);
    const int64_t first_query = kv_lens[row] - num_new, seen_from = step->window > 0 ? std::max<int64_t>(0, first_query - step->window + 1) : 0;
    for (int64_t i = seen_from / step->block_size; num_new > 0 && i * step->block_size < kv_lens[row]; i++)
      if (tables[row * width + i] < 0) return HOLE;
  }
  int32_t highest = -1;
  for (int64_t i = 0; i < num_rows * width; i++) highest = std::max(highest, tables[i]);
  std::copy(query_starts, query_starts + num_rows + 1, step->query_starts);
  std::copy(kv_lens, kv_lens + num_rows, step->kv_lens);
  for (int64_t row = 0; row < num_rows; row++) std::copy(tables + row * width, tables + (row + 1) * width, step->tables + row * step->table_width);
  step->num_rows = static_cast<int32_t>(num_rows), step->max_kv_len = longest, step->highest_block = highest;
  step->num_tasks = lay_out_tasks(*step);
  return highest;
}

int xllm_attention(
    const XllmAttention* step, const void* q, const void* k, const void* v, const float* k_steps, const float* v_steps, void* out, int64_t num_blocks) {
  if (step->highest_block >= num_blocks) return 1;
  const Layer layer{*step, q, k, v, k_steps, v_steps, out};
  if (layer.is_int8) run<Int8>(layer);
  else if (layer.is_bf16) run<Plain<Bf16>>(layer);
  else run<Plain<F32>>(layer);
  return 0;
}
