// Causal attention over paged KV, prefill and decode alike.
//
// The queries of one KV head (its group of query heads, times the tokens of a row) are rows of a small matrix: scores are that matrix times
// packed keys, outputs are weights times packed values, by the same microkernel as linear maps. Positions are walked in chunks of 64 with an
// online softmax, inside splits of 256 that are merged in order by their log-sum-exp. Chunks and splits lie at fixed absolute positions, so
// a query's result depends on its own position alone: not on the chunk it was prefilled in, its neighbours, or how splits were shared out.
// Sources: FlashAttention-2, arXiv:2307.08691 (online softmax); Flash-Decoding (splits over KV).
//
// Limits: decode reads 2 * kv_len * G * D elements a row from memory; prefill does 4 * D operations per query head and position seen.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "api.h"
#include "gemm.h"
#include "pool.h"

namespace xllm {
namespace {

constexpr int CHUNK = 64;    // positions whose keys and values are packed at a time; a multiple of NR for every instruction set
constexpr int SPLIT = 256;   // positions of one partial result
constexpr int QUERIES = 96;  // rows of one task, at most: tokens times the heads of the group
constexpr float NONE = -std::numeric_limits<float>::infinity();
static_assert(CHUNK % NR == 0 && SPLIT % CHUNK == 0);

inline int tokens_per_task(int group) { return std::max(1, QUERIES / group); }

// Partial or whole result of n queries: greatest score, sum of weights, weighted values [n][width].
struct State {
  std::vector<float> top, total, value;
  void reset(int n, int64_t width) {
    top.assign(static_cast<size_t>(n), NONE);
    total.assign(static_cast<size_t>(n), 0.0f);
    value.assign(static_cast<size_t>(n * width), 0.0f);
  }
};

// Buffers stay with the thread from call to call.
template <class E> struct Buffers {
  std::vector<typename E::T> queries, keys, values, weights;
  std::vector<float> scores;
  State part, whole;
};

template <class E> struct Worker {
  using T = typename E::T;
  const XllmAttention& call;
  const int group, head_size;
  const int64_t key_steps, value_panels, width, q_width;  // width: head_size in whole panels
  std::vector<T>&queries, &keys, &values, &weights;
  std::vector<float>& scores;
  State &part, &whole;
  // of the task at hand
  int row = 0, kv_head = 0, first = 0, tokens = 0, num_queries = 0, past = 0;

  Worker(const XllmAttention& c, Buffers<E>& b)
      : call(c), group(c.num_heads / c.num_kv_heads), head_size(c.head_size), key_steps(steps_of<E>(c.head_size)),
        value_panels(round_up(c.head_size, NR) / NR), width(value_panels * NR), q_width(key_steps * E::P), queries(b.queries), keys(b.keys),
        values(b.values), weights(b.weights), scores(b.scores), part(b.part), whole(b.whole) {
    const auto rows = static_cast<size_t>(tokens_per_task(group) * group);
    queries.resize(rows * static_cast<size_t>(q_width));
    keys.resize(static_cast<size_t>(CHUNK * q_width));
    values.resize(static_cast<size_t>(CHUNK * width));
    weights.resize(static_cast<size_t>(MAX_MR * CHUNK));
    scores.resize(static_cast<size_t>(MAX_MR * CHUNK));
  }

  void take(const int32_t* task) {
    row = task[0], kv_head = task[1], first = task[2];
    const int begin = call.query_starts[row], end = call.query_starts[row + 1];
    tokens = std::min(tokens_per_task(group), end - first);
    num_queries = tokens * group;
    past = call.kv_lens[row] - (end - begin) - begin;  // position of flat token t is past + t
    for (int t = 0; t < tokens; t++)
      for (int g = 0; g < group; g++) {
        const auto* from = static_cast<const T*>(call.q) + (static_cast<int64_t>(first + t) * call.num_heads + kv_head * group + g) * head_size;
        T* to = queries.data() + (t * group + g) * q_width;
        std::memcpy(to, from, sizeof(T) * static_cast<size_t>(head_size));
        for (int64_t d = head_size; d < q_width; d++) to[d] = T{0};
      }
  }

  int position(int query) const { return past + first + query / group; }
  int last() const { return past + first + tokens - 1; }
  int begin_of(int query) const { return call.window > 0 ? std::max(0, position(query) - call.window + 1) : 0; }
  int first_split() const { return begin_of(0) / SPLIT; }
  int num_splits() const { return last() / SPLIT + 1; }

  // Address of a position's keys or values, null for a hole or a block that is not there.
  const T* at(const void* cache, int position) const {
    const int32_t block = call.tables[row * call.table_width + position / call.block_size];
    if (block < 0) return nullptr;
    const int64_t slot = static_cast<int64_t>(block) * call.block_size + position % call.block_size;
    return static_cast<const T*>(cache) + (slot * call.num_kv_heads + kv_head) * head_size;
  }

  // Keys and values of positions `from` to `to` of the chunk at `start`, packed; what lies outside may never have been written and is zero here.
  void pack(int start, int from, int to) {
    const T* from_k[CHUNK];
    const T* from_v[CHUNK];
    for (int p = 0; p < CHUNK; p++) {
      from_k[p] = start + p >= from && start + p < to ? at(call.k, start + p) : nullptr;
      from_v[p] = from_k[p] != nullptr ? at(call.v, start + p) : nullptr;
    }
#if defined(__AVX512F__)
    if (head_size * sizeof(T) % 64 == 0) pack_keys_by_16(from_k);
    else
#endif
      for (int p = 0; p < CHUNK; p++) pack_key(from_k[p], p);
    for (int p = 0; p < CHUNK; p += E::P) pack_values(from_v + p, p / E::P);
  }

#if defined(__AVX512F__)
  void pack_keys_by_16(const T* const* from) {  // 16 positions and 64 bytes of each at a time
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int p = 0; p < CHUNK; p += 16)
      for (int64_t d = 0; d < head_size; d += LINE) {
        const void* rows[16];
        for (int i = 0; i < 16; i++) rows[i] = from[p + i] != nullptr ? from[p + i] + d : nullptr;
        T* to = keys.data() + (p / NR) * (key_steps * NR * E::P) + (d / E::P * NR + p % NR) * E::P;
        transpose16(rows, reinterpret_cast<char*>(to), NR * E::P * sizeof(T));
      }
  }
#endif

  void pack_key(const T* from, int p) {
    T* to = keys.data() + (p / NR) * (key_steps * NR * E::P) + (p % NR) * E::P;
    if (from == nullptr) {
      for (int64_t s = 0; s < key_steps; s++, to += NR * E::P)
        for (int i = 0; i < E::P; i++) to[i] = T{0};
      return;
    }
    const int64_t whole_steps = head_size / E::P;
    for (int64_t s = 0; s < whole_steps; s++, to += NR * E::P) std::memcpy(to, from + s * E::P, sizeof(T) * E::P);
    if (whole_steps < key_steps) {
      to[0] = from[head_size - 1];
      for (int i = 1; i < E::P; i++) to[i] = T{0};
    }
  }

  void pack_values(const T* const* from, int64_t step) {
    for (int64_t panel = 0; panel < value_panels; panel++) {
      T* to = values.data() + panel * (CHUNK * NR) + step * NR * E::P;
      const int count = static_cast<int>(std::min<int64_t>(NR, head_size - panel * NR));
#if defined(__AVX512F__)
      if constexpr (E::P == 2)
        if (count == NR) {
          interleave32(from[0] != nullptr ? from[0] + panel * NR : nullptr, from[1] != nullptr ? from[1] + panel * NR : nullptr, to);
          continue;
        }
#endif
      for (int i = 0; i < E::P; i++) {
        const T* row_of = from[i] != nullptr ? from[i] + panel * NR : nullptr;
        for (int d = 0; d < NR; d++) to[d * E::P + i] = row_of != nullptr && d < count ? row_of[d] : T{0};
      }
    }
  }

  // One split into `part`.
  void run_split(int split) {
    part.reset(num_queries, width);
    const int begin = std::max(split * SPLIT, begin_of(0) / CHUNK * CHUNK), end = std::min((split + 1) * SPLIT, last() + 1);
    for (int start = begin; start < end; start += CHUNK) {
      pack(start, begin_of(0), end);
      for (int query = 0; query < num_queries; query += MAX_MR) {
        const int count = std::min(MAX_MR, num_queries - query);
        if (position(query + count - 1) < start) continue;  // none of them sees this chunk
        with_rows(count, [&]<int MR>() { chunk<MR>(query, start); });
      }
    }
  }

  template <int MR> void chunk(int query, int start) {
    for (int panel = 0; panel < CHUNK / NR; panel++) {
      F c[MR][2];
      for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = zero();
      multiply<E, MR>(queries.data() + query * q_width, q_width, keys.data() + panel * (key_steps * NR * E::P), key_steps, c);
      for (int i = 0; i < MR; i++) store(scores.data() + i * CHUNK + panel * NR, c[i][0]), store(scores.data() + i * CHUNK + panel * NR + W, c[i][1]);
    }
    for (int i = 0; i < MR; i++) soften(query + i, scores.data() + i * CHUNK, weights.data() + i * CHUNK, start);
    for (int64_t panel = 0; panel < value_panels; panel++) {
      F c[MR][2];
      float* value = part.value.data() + query * width + panel * NR;
      for (int i = 0; i < MR; i++) c[i][0] = load(value + i * width), c[i][1] = load(value + i * width + W);
      multiply<E, MR>(weights.data(), CHUNK, values.data() + panel * (CHUNK * NR), CHUNK / E::P, c);
      for (int i = 0; i < MR; i++) store(value + i * width, c[i][0]), store(value + i * width + W, c[i][1]);
    }
  }

  // Scores of one query over a chunk to weights, relative to the greatest score so far; what was summed before is scaled to it.
  void soften(int query, float* s, T* weight, int start) {
    const int from = std::max(0, begin_of(query) - start), to = std::min(CHUNK, position(query) + 1 - start);
    F most = set1(NONE);
    for (int p = 0; p < CHUNK; p += W) {
      F x = mul(load(s + p), set1(call.scale));
      if (call.soft_cap > 0) x = cap(x);
      store(s + p, x);
    }
    for (int p = 0; p < CHUNK; p++)
      if (p < from || p >= to) s[p] = NONE;
    for (int p = 0; p < CHUNK; p += W) most = vmax(most, load(s + p));
    const auto q = static_cast<size_t>(query);
    const float before = part.top[q], now = std::max(before, top(most));
    if (now == NONE) {
      std::fill(weight, weight + CHUNK, T{0});
      return;
    }
    F total = zero();
    for (int p = 0; p < CHUNK; p += W) {
      const F w = vexp(sub(load(s + p), set1(now)));
      total = add(total, w);
      E::from_float(weight + p, w);
    }
    const float factor = exp1(before - now);
    part.top[q] = now;
    part.total[q] = part.total[q] * factor + sum(total);
    if (before != now) scale(part.value.data() + query * width, factor);
  }

  F cap(F x) const {  // soft_cap * tanh(x / soft_cap), by e**(2y); tanh is 1 from 15 on in float32
    const F y = vmax(vmin(div(x, set1(call.soft_cap)), set1(15.0f)), set1(-15.0f));
    const F e = vexp(add(y, y));
    return mul(set1(call.soft_cap), div(sub(e, set1(1.0f)), add(e, set1(1.0f))));
  }

  void scale(float* value, float factor) const {
    for (int64_t d = 0; d < width; d += W) store(value + d, mul(load(value + d), set1(factor)));
  }

  // whole and a partial result become whole.
  void merge(const float* tops, const float* totals, const float* value) {
    for (int query = 0; query < num_queries; query++) {
      const auto q = static_cast<size_t>(query);
      if (tops[q] == NONE) continue;
      const float now = std::max(whole.top[q], tops[q]);
      const F old = set1(exp1(whole.top[q] - now)), own = set1(exp1(tops[q] - now));
      float* into = whole.value.data() + query * width;
      for (int64_t d = 0; d < width; d += W) store(into + d, fma(load(value + query * width + d), own, mul(load(into + d), old)));
      whole.total[q] = whole.total[q] * exp1(whole.top[q] - now) + totals[q] * exp1(tops[q] - now);
      whole.top[q] = now;
    }
  }

  void write() {
    for (int query = 0; query < num_queries; query++) {
      const float* value = whole.value.data() + query * width;
      const F factor = set1(1.0f / whole.total[static_cast<size_t>(query)]);
      const int64_t head = static_cast<int64_t>(first + query / group) * call.num_heads + kv_head * group + query % group;
      T* to = static_cast<T*>(call.out) + head * head_size;
      for (int d = 0; d < head_size; d += W) store_part<E>(to + d, mul(load(value + d), factor), head_size - d);
    }
  }

  void run(const int32_t* task) {
    take(task);
    whole.reset(num_queries, width);
    for (int split = first_split(); split < num_splits(); split++) {
      run_split(split);
      merge(part.top.data(), part.total.data(), part.value.data());
    }
    write();
  }
};

template <class E, class Fn> void with_worker(const XllmAttention& call, Fn fn) {
  thread_local Buffers<E> kept;
  Worker<E> worker(call, kept);
  fn(worker);
}

template <class E> void run_tasks(const XllmAttention& call) {
  const int64_t grain = std::max<int64_t>(1, call.num_tasks / (16 * num_threads()));
  parallel_for((call.num_tasks + grain - 1) / grain, [&](int64_t piece) {
    with_worker<E>(call, [&](Worker<E>& worker) {
      for (int64_t i = piece * grain; i < std::min(call.num_tasks, (piece + 1) * grain); i++) worker.run(call.tasks + 3 * i);
    });
  });
}

// Fewer tasks than threads could share, and long contexts: splits are computed apart, then merged in the same order with the same arithmetic.
template <class E> void run_splits(const XllmAttention& call) {
  const int64_t splits = (call.max_kv_len + SPLIT - 1) / SPLIT;
  std::vector<State> parts(static_cast<size_t>(call.num_tasks * splits));
  parallel_for(call.num_tasks * splits, [&](int64_t piece) {
    with_worker<E>(call, [&](Worker<E>& worker) {
      worker.take(call.tasks + 3 * (piece / splits));
      const int split = static_cast<int>(piece % splits);
      if (split < worker.first_split() || split >= worker.num_splits()) return;
      worker.run_split(split);
      std::swap(parts[static_cast<size_t>(piece)], worker.part);
    });
  });
  parallel_for(call.num_tasks, [&](int64_t task) {
    with_worker<E>(call, [&](Worker<E>& worker) {
      worker.take(call.tasks + 3 * task);
      worker.whole.reset(worker.num_queries, worker.width);
      for (int64_t split = 0; split < splits; split++) {
        const State& part = parts[static_cast<size_t>(task * splits + split)];
        if (!part.top.empty()) worker.merge(part.top.data(), part.total.data(), part.value.data());
      }
      worker.write();
    });
  });
}

}  // namespace
}  // namespace xllm

using namespace xllm;

int64_t xllm_attention_tasks(const int32_t* query_starts, int32_t num_rows, int32_t num_heads, int32_t num_kv_heads, int32_t* tasks) {
  const int step = tokens_per_task(num_heads / num_kv_heads);
  int64_t count = 0;
  for (int32_t row = num_rows - 1; row >= 0; row--)  // later rows are prompts more often than not: long tasks first
    for (int32_t t = query_starts[row + 1] - 1 - (query_starts[row + 1] - query_starts[row] - 1) % step; t >= query_starts[row]; t -= step)
      for (int32_t g = 0; g < num_kv_heads; g++, count++)
        if (tasks != nullptr) tasks[3 * count] = row, tasks[3 * count + 1] = g, tasks[3 * count + 2] = t;
  return count;
}

int xllm_attention(const XllmAttention* call) {
  const bool is_short_of_tasks = call->num_tasks < 2 * num_threads() && call->max_kv_len > SPLIT && num_threads() > 1;
  if (call->is_bf16) is_short_of_tasks ? run_splits<Bf16>(*call) : run_tasks<Bf16>(*call);
  else is_short_of_tasks ? run_splits<F32>(*call) : run_tasks<F32>(*call);
  return 0;
}
