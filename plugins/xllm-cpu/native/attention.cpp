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
constexpr int FEW = 4;       // queries of one KV head
constexpr int ALL = -1;      // a task of all KV heads
constexpr float NONE = -std::numeric_limits<float>::infinity();
static_assert(CHUNK % NR == 0 && SPLIT % CHUNK == 0);

inline int tokens_per_task(int group) { return std::max(1, QUERIES / group); }

// Up to so many tokens a row is one task of all its KV heads: keys and values of a position lie side by side, and are read in one sweep.
inline int tokens_of_all(int group) { return std::max(1, MAX_MR / group); }

// Partial or whole result of n queries: greatest score, sum of weights, weighted values [n][width].
struct State {
  Lines<float> top, total, value;
  void reset(int n, int64_t width) {
    top.assign(static_cast<size_t>(n), NONE);
    total.assign(static_cast<size_t>(n), 0.0f);
    value.assign(static_cast<size_t>(n * width), 0.0f);
  }
};

// Keys and values that are read next, asked for a line at a time between the instructions of what is computed now. Memory gives a line in the time of ten
// or so of these: asked for faster, by the position or by the hundred, many would be dropped, and each would be waited for later.
class Ahead {
 public:
  void begin(int64_t bytes_of_position) { count_ = next_ = 0, left_ = 0, bytes_ = bytes_of_position; }
  // A position, behind the one before it in memory or elsewhere.
  void add(const char* keys, const char* values) {
    if (count_ > 0 && runs_[count_ - 2].at + runs_[count_ - 2].bytes == keys) {
      runs_[count_ - 2].bytes += bytes_, runs_[count_ - 1].bytes += bytes_;
      return;
    }
    runs_[count_++] = {keys, bytes_};
    runs_[count_++] = {values, bytes_};
  }
  bool has_more() const { return left_ > 0 || next_ < count_; }
  inline __attribute__((always_inline)) void fetch() {
#if defined(__AVX512F__)
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
  Run runs_[2 * CHUNK];
  int count_ = 0, next_ = 0;
  int64_t bytes_ = 0, left_ = 0;
  const char* at_ = nullptr;
};

// Buffers stay with the thread from call to call.
template <class E> struct Buffers {
  Lines<typename E::T> queries, keys, values, weights;
  Lines<float> scores;
  State part, whole;
};

// A step's call, with this layer's tensors.
struct Layer : XllmAttention {
  const void *q, *k, *v;
  void* out;
};

template <class E> struct Worker {
  using T = typename E::T;
  const Layer& call;
  const int group, head_size;
  const int64_t key_steps, value_panels, width, q_width;  // width: head_size in whole panels
  Lines<T>&queries, &keys, &values, &weights;
  Lines<float>& scores;
  State &part, &whole;
  // of the task at hand; its queries lie head by head, and of each KV head token by token
  Ahead ahead;
  bool is_ahead = false;  // the chunk that comes next was asked for
  const int32_t* following = nullptr;  // the task that this thread most likely takes next
  int row = 0, kv_head = 0, num_kv_heads = 1, first = 0, tokens = 0, per_head = 0, num_queries = 0, past = 0;

  Worker(const Layer& c, Buffers<E>& b)
      : call(c), group(c.num_heads / c.num_kv_heads), head_size(c.head_size), key_steps(steps_of<E>(c.head_size)),
        value_panels(round_up(c.head_size, NR) / NR), width(value_panels * NR), q_width(key_steps * E::P), queries(b.queries), keys(b.keys),
        values(b.values), weights(b.weights), scores(b.scores), part(b.part), whole(b.whole) {
    const auto rows = static_cast<size_t>(std::max(tokens_per_task(group) * group, tokens_of_all(group) * c.num_heads));
    queries.resize(rows * static_cast<size_t>(q_width));
    keys.resize(static_cast<size_t>(CHUNK * q_width));
    values.resize(static_cast<size_t>(CHUNK * width));
    weights.resize(static_cast<size_t>(MAX_MR * CHUNK));
    scores.resize(static_cast<size_t>(MAX_MR * CHUNK));
  }

  void take(const int32_t* task) {
    row = task[0], kv_head = std::max(0, task[1]), num_kv_heads = task[1] == ALL ? call.num_kv_heads : 1, first = task[2];
    const int begin = call.query_starts[row], end = call.query_starts[row + 1];
    tokens = std::min(task[1] == ALL ? tokens_of_all(group) : tokens_per_task(group), end - first);
    per_head = tokens * group, num_queries = per_head * num_kv_heads;
    past = call.kv_lens[row] - (end - begin) - begin;  // position of flat token t is past + t
    for (int query = 0; query < num_queries; query++) {
      T* to = queries.data() + query * q_width;
      std::memcpy(to, static_cast<const T*>(call.q) + head_of(query) * head_size, sizeof(T) * static_cast<size_t>(head_size));
      for (int64_t d = head_size; d < q_width; d++) to[d] = T{0};
    }
  }

  // Where a query's head lies among all heads of all tokens.
  int64_t head_of(int query) const {
    const int head = query / per_head, at = query % per_head;
    return static_cast<int64_t>(first + at / group) * call.num_heads + (kv_head + head) * group + at % group;
  }
  int position(int query) const { return past + first + query % per_head / group; }
  int last() const { return past + first + tokens - 1; }
  int begin_of(int query) const { return call.window > 0 ? std::max(0, position(query) - call.window + 1) : 0; }
  int first_split() const { return begin_of(0) / SPLIT; }
  int num_splits() const { return last() / SPLIT + 1; }

  // Calls fn(p, element offset of the keys and values of `head` at position start + p) for positions from `from` to `to` of a chunk whose block is there.
  template <class Fn> void each_slot(int of_row, int head, int start, int from, int to, Fn fn) const {
    const int32_t* table = call.tables + of_row * call.table_width;
    const int64_t stride = static_cast<int64_t>(call.num_kv_heads) * head_size;
    for (int p = std::max(0, from - start), end = std::min(CHUNK, to - start); p < end;) {
      const int index = (start + p) / call.block_size, slot = (start + p) % call.block_size, block_end = std::min(end, p + call.block_size - slot);
      if (table[index] < 0) {
        p = block_end;
        continue;
      }
      int64_t offset = (static_cast<int64_t>(table[index]) * call.block_size + slot) * stride + static_cast<int64_t>(head) * head_size;
      for (; p < block_end; p++, offset += stride) fn(p, offset);
    }
  }

  int64_t bytes_of_all() const { return num_kv_heads * head_size * static_cast<int64_t>(sizeof(T)); }

  // Read every line of a chunk of the task's heads once, in the order of memory: the processor then reads ahead. Packing would wait for each line.
  void touch(int start, int from, int to) const {
    for (const void* cache : {call.k, call.v})
      each_slot(row, kv_head, start, from, to, [&](int, int64_t offset) {
        const auto* line = reinterpret_cast<const volatile char*>(static_cast<const T*>(cache) + offset);
        for (int64_t at = 0; at < bytes_of_all(); at += 64) (void)line[at];
      });
  }

  // The next chunk of the task's heads; behind the last one the first of the task that follows, if both are of all heads.
  void look_ahead(int start) {
    ahead.begin(bytes_of_all());
    const auto add = [&](int, int64_t offset) { ahead.add(reinterpret_cast<const char*>(static_cast<const T*>(call.k) + offset), reinterpret_cast<const char*>(static_cast<const T*>(call.v) + offset)); };
    if (start <= last()) each_slot(row, kv_head, start, begin_of(0), last() + 1, add);
    else if (num_kv_heads > 1 && following != nullptr && following[1] == ALL && call.window == 0) each_slot(following[0], 0, 0, 0, call.kv_lens[following[0]], add);
    is_ahead = ahead.has_more();
  }

  // Where keys and values of a chunk lie, of the first head; null for what is outside, which may never have been written and counts as zero.
  struct Found {
    const T* keys[CHUNK] = {};
    const T* values[CHUNK] = {};
    int end = 0;  // positions from here on are outside
    void shift(int64_t offset) {
      for (auto* list : {keys, values})
        for (int p = 0; p < end; p++) list[p] = list[p] != nullptr ? list[p] + offset : nullptr;
    }
  };
  void find(int start, int from, int to, Found& found) const {
    each_slot(row, kv_head, start, from, to, [&](int p, int64_t offset) {
      found.keys[p] = static_cast<const T*>(call.k) + offset;
      found.values[p] = static_cast<const T*>(call.v) + offset;
      found.end = p + 1;
    });
  }
  static const T* part_of(const T* row, int64_t panel) { return row != nullptr ? row + panel * NR : nullptr; }

  void pack(const Found& found) {
    const auto &from_k = found.keys, &from_v = found.values;
#if defined(__AVX512F__)
    if (head_size * sizeof(T) % 64 == 0) pack_keys_by_16(from_k);
    else
#endif
      for (int p = 0; p < CHUNK; p++) pack_key(from_k[p], p);
    for (int p = 0; p < CHUNK; p += E::P) {
      pack_values(from_v + p, p / E::P);
      if (p % 4 == 0) ahead.fetch(2 * bytes_of_all());
    }
  }

#if defined(__AVX512F__)
  void pack_keys_by_16(const T* const* from) {  // 16 positions and 64 bytes of each at a time
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int p = 0; p < CHUNK; p += 16)
      for (int64_t d = 0; d < head_size; d += LINE) {
        const void* rows[16];
        for (int i = 0; i < 16; i++) rows[i] = from[p + i] != nullptr ? from[p + i] + d : nullptr;
        T* to = keys.data() + (p / NR) * (key_steps * NR * E::P) + (d / E::P * NR + p % NR) * E::P;
        ahead.fetch(2 * bytes_of_all());
        I found[16];
        transpose16(rows, found);
        for (int i = 0; i < 16; i++) storei(to + i * NR * E::P, found[i]);
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
          I low, high;
          interleave32(part_of(from[0], panel), part_of(from[1], panel), low, high);
          storei(to, low), storei(to + NR, high);
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
      if (!is_ahead) touch(start, begin_of(0), end);
      look_ahead(start + CHUNK);  // beyond the split as well
      Found found;
      find(start, begin_of(0), end, found);
      for (int head = 0; head < num_kv_heads; head++) {
        const int past_head = (head + 1) * per_head;
        if (head > 0) found.shift(head_size);
#if defined(__AVX512F__)
        if constexpr (E::P == 2)
          if (per_head <= FEW && head_size % NR == 0) {
            with_rows<FEW>(per_head, [&]<int MR>() { chunk_of_few<MR>(head * per_head, start, found); });
            continue;
          }
#endif
        pack(found);
        for (int query = head * per_head; query < past_head; query += MAX_MR) {
          const int count = std::min(MAX_MR, past_head - query);
          if (position(query + count - 1) < start) continue;  // none of them sees this chunk
          with_rows(count, [&]<int MR>() { chunk<MR>(query, start); });
        }
      }
      while (ahead.has_more()) ahead.fetch(64);  // what fewer tiles left
    }
  }

#if defined(__AVX512F__)
  // Few queries: packing would cost more than it saves. Keys and values are turned in registers and used there, in the order of `chunk`.
  template <int MR> void chunk_of_few(int query, int start, const Found& found) {
    for (int p = 0; p < CHUNK; p += 16) {
      F c[MR];
      for (int i = 0; i < MR; i++) c[i] = zero();
      for (int64_t d = 0; d < head_size && p < found.end; d += 32) {
        const void* rows[16];
        for (int i = 0; i < 16; i++) rows[i] = found.keys[p + i] != nullptr ? found.keys[p + i] + d : nullptr;
        I turned[16];
        transpose16(rows, turned);
#pragma GCC unroll 16
        for (int s = 0; s < 16; s++) {
          ahead.fetch();
#pragma GCC unroll 4
          for (int i = 0; i < MR; i++) c[i] = dot2(c[i], bcast(queries.data() + (query + i) * q_width + d + 2 * s), turned[s]);
        }
      }
      for (int i = 0; i < MR; i++) store(scores.data() + i * CHUNK + p, c[i]);
    }
    for (int i = 0; i < MR; i++) soften(query + i, scores.data() + i * CHUNK, weights.data() + i * CHUNK, start);
    for (int64_t panel = 0; panel < value_panels; panel++) {
      F c[MR][2];
      float* value = part.value.data() + query * width + panel * NR;
      for (int i = 0; i < MR; i++) apart(load(value + i * width), load(value + i * width + W), c[i][0], c[i][1]);
      for (int p = 0; p < CHUNK; p += 2) {
        I low, high;
        interleave_lanes(part_of(found.values[p], panel), part_of(found.values[p + 1], panel), low, high);
        ahead.fetch(), ahead.fetch();
        for (int i = 0; i < MR; i++) {
          const I weight = bcast(weights.data() + i * CHUNK + p);
          c[i][0] = dot2(c[i][0], weight, low), c[i][1] = dot2(c[i][1], weight, high);
        }
      }
      for (int i = 0; i < MR; i++) {
        F first, second;
        together(c[i][0], c[i][1], first, second);
        store(value + i * width, first), store(value + i * width + W, second);
      }
    }
  }
#endif

  template <int MR> void chunk(int query, int start) {
    for (int panel = 0; panel < CHUNK / NR; panel++) {
      F c[MR][2];
      for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = zero();
      multiply<E, MR>(queries.data() + query * q_width, q_width, keys.data() + panel * (key_steps * NR * E::P), key_steps, c);
      for (int i = 0; i < MR; i++) store(scores.data() + i * CHUNK + panel * NR, c[i][0]), store(scores.data() + i * CHUNK + panel * NR + W, c[i][1]);
    }
    for (int i = 0; i < MR; i++) {
      ahead.fetch(2 * bytes_of_all());
      soften(query + i, scores.data() + i * CHUNK, weights.data() + i * CHUNK, start);
    }
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
    constexpr int N = CHUNK / W;
    if (to <= 0) {  // it sees nothing of this chunk
      std::fill(weight, weight + CHUNK, T{0});
      return;
    }
    F x[N];
    for (int n = 0; n < N; n++) {
      x[n] = mul(load(s + n * W), set1(call.scale));
      if (call.soft_cap > 0) x[n] = cap(x[n]);
    }
    if (from > 0 || to < CHUNK)
      for (int n = 0; n < N; n++) x[n] = within(x[n], from - n * W, to - n * W, NONE);
    F most = x[0];
    for (int n = 1; n < N; n++) most = vmax(most, x[n]);
    const auto q = static_cast<size_t>(query);
    const float before = part.top[q], now = std::max(before, top(most));
    if (now == NONE) {
      std::fill(weight, weight + CHUNK, T{0});
      return;
    }
    F total = zero();
    for (int n = 0; n < N; n++) {
      const F w = vexp(sub(x[n], set1(now)));
      total = add(total, w);
      E::from_weight(weight + n * W, w);
    }
    if (before != now) {
      const float factor = exp1(before - now);
      part.top[q] = now;
      part.total[q] *= factor;
      scale(part.value.data() + query * width, factor);
    }
    part.total[q] += sum(total);
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
      T* to = static_cast<T*>(call.out) + head_of(query) * head_size;
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

template <class E, class Fn> void with_worker(const Layer& call, Fn fn) {
  thread_local Buffers<E> kept;
  Worker<E> worker(call, kept);
  fn(worker);
}

template <class E> void run_tasks(const Layer& call) {
  const bool is_decode = call.num_tasks > 0 && call.tasks[1] == ALL && call.tasks[3 * call.num_tasks - 2] == ALL;
  const int64_t grain = std::max<int64_t>(1, call.num_tasks / ((is_decode ? 8 : 16) * num_threads()));
  parallel_for((call.num_tasks + grain - 1) / grain, [&](int64_t piece) {
    with_worker<E>(call, [&](Worker<E>& worker) {
      const int64_t end = std::min<int64_t>(call.num_tasks, (piece + 1) * grain);
      for (int64_t i = piece * grain; i < end; i++) {
        worker.following = i + 1 < call.num_tasks ? call.tasks + 3 * (i + 1) : nullptr;  // most often this thread's, in the next piece too
        worker.run(call.tasks + 3 * i);
      }
    });
  });
}

// Fewer tasks than threads could share, and long contexts: splits are computed apart, then merged in the same order with the same arithmetic.
template <class E> void run_splits(const Layer& call) {
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
  constexpr int64_t UNFIT = -2;
  if (num_rows > max_rows || width > step->table_width || query_starts[0] != 0 || query_starts[num_rows] > max_tokens) return UNFIT;
  int32_t longest = 0;
  for (int64_t row = 0; row < num_rows; row++) {
    const int64_t num_new = static_cast<int64_t>(query_starts[row + 1]) - query_starts[row];
    if (num_new < 0 || num_new > kv_lens[row] || kv_lens[row] > width * step->block_size || (is_decode != 0 && num_new != 1)) return UNFIT;
    longest = std::max(longest, kv_lens[row]);
  }
  int32_t highest = -1;
  for (int64_t i = 0; i < num_rows * width; i++) highest = std::max(highest, tables[i]);
  std::copy(query_starts, query_starts + num_rows + 1, step->query_starts);
  std::copy(kv_lens, kv_lens + num_rows, step->kv_lens);
  for (int64_t row = 0; row < num_rows; row++) std::copy(tables + row * width, tables + (row + 1) * width, step->tables + row * step->table_width);
  step->num_rows = static_cast<int32_t>(num_rows), step->max_kv_len = longest;
  step->num_tasks = lay_out_tasks(*step);
  return highest;
}

int xllm_attention(const XllmAttention* step, const void* q, const void* k, const void* v, void* out) {
  const Layer layer{*step, q, k, v, out};
  const bool is_short_of_tasks = layer.num_tasks < 4 * num_threads() && layer.max_kv_len > SPLIT && num_threads() > 1;
  if (layer.is_bf16) is_short_of_tasks ? run_splits<Bf16>(layer) : run_tasks<Bf16>(layer);
  else is_short_of_tasks ? run_splits<F32>(layer) : run_tasks<F32>(layer);
  return 0;
}
