// Causal attention over paged KV, prefill and decode alike.
//
// The queries of one KV head (its group of query heads, times the tokens of a row) are rows of a small matrix: scores are that matrix times
// packed keys, outputs are weights times packed values, by the same microkernel as linear maps. Positions are walked in splits of 256: all scores
// of a split, their softmax, then its values; splits are merged in order by their log-sum-exp. They lie at fixed absolute positions, so a query's
// result depends on its own position alone: not on the chunk it was prefilled in, its neighbours, or how splits were shared out.
// Sources: FlashAttention-2, arXiv:2307.08691 (online softmax); Flash-Decoding (splits over KV).
//
// Limits: decode reads 2 * kv_len * G * D elements (and of codes 2 * kv_len * G steps) a row from memory; prefill does 4 * D operations per query head and position seen.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention_data.h"
#include "read_ahead.h"

namespace xllm {

constexpr int SPLIT = 256;   // positions of one partial result; a multiple of NR for every instruction set
constexpr int QUERIES = 96;  // rows of one task, at most: tokens times the heads of the group
constexpr int FEW = 4;       // queries of one KV head
constexpr int ALL = -1;      // a task of all KV heads
constexpr float NONE = -std::numeric_limits<float>::infinity();
constexpr float LOG2_E = 1.44269504088896341f;
constexpr float LEAST = std::numeric_limits<float>::lowest();  // NONE less this is NONE
static_assert(SPLIT % NR == 0);

inline int tokens_per_task(int group) { return std::max(1, QUERIES / group); }

// Up to so many tokens a row is one task of all its KV heads: keys and values of a position lie side by side, and are read in one sweep.
inline int tokens_of_all(int group) { return std::max(1, MAX_MR / group); }

template <class K> struct Worker {
  using T = typename K::T;
  using Cached = typename K::Cached;
  using Sum = typename K::Sum;
  const Layer& call;
  const int group, head_size;
  const int64_t key_steps, value_panels, width, q_width;  // width: head_size in whole panels
  Buffers<K>& room;
  Lines<T>&queries, &keys, &values, &weights;
  Lines<float>& scores;
  State &part, &whole;
  Split& asked;
  // of the task at hand; its queries lie head by head, and of each KV head token by token
  ReadAhead<(K::HAS_STEPS ? 4 : 2) * SPLIT> ahead;
  const int32_t* task = nullptr;
  int row = 0, kv_head = 0, num_kv_heads = 1, first = 0, tokens = 0, per_head = 0, num_queries = 0, past = 0;

  Worker(const Layer& c, Buffers<K>& b)
      : call(c), group(c.num_heads / c.num_kv_heads), head_size(c.head_size), key_steps(steps_of<K>(c.head_size)),
        value_panels(round_up(c.head_size, NR) / NR), width(value_panels * NR), q_width(key_steps * K::P), room(b), queries(b.queries), keys(b.keys),
        values(b.values), weights(b.weights), scores(b.scores), part(b.part), whole(b.whole), asked(b.asked) {
    const auto rows = static_cast<size_t>(std::max(tokens_per_task(group) * group, tokens_of_all(group) * c.num_heads));
    const auto at_once = static_cast<size_t>(std::max(MAX_MR, tokens_of_all(group) * c.num_heads));
    queries.resize(rows * static_cast<size_t>(q_width) + W);
    keys.resize(static_cast<size_t>(SPLIT * q_width));
    values.resize(static_cast<size_t>(SPLIT * width));
    weights.resize(at_once * SPLIT);
    scores.resize(at_once * SPLIT);
    room.nothing.resize(static_cast<size_t>(c.num_kv_heads * head_size) + NR);
    if constexpr (K::HAS_STEPS) {
      room.query_steps.resize(rows), room.weight_steps.resize(at_once);
      for (Lines<float>* steps : {&room.key_steps, &room.value_steps}) steps->resize(static_cast<size_t>(c.num_kv_heads * SPLIT));
    }
  }

  void take(const int32_t* taken) {
    task = taken;
    row = task[0], kv_head = std::max(0, task[1]), num_kv_heads = task[1] == ALL ? call.num_kv_heads : 1, first = task[2];
    const int begin = call.query_starts[row], end = call.query_starts[row + 1];
    tokens = std::min(task[1] == ALL ? tokens_of_all(group) : tokens_per_task(group), end - first);
    per_head = tokens * group, num_queries = per_head * num_kv_heads;
    past = call.kv_lens[row] - (end - begin) - begin;  // position of flat token t is past + t
    for (int query = 0; query < num_queries; query++) {
      T* to = queries.data() + query * q_width;
      if constexpr (K::HAS_STEPS) {
        const int64_t at = head_of(query) * head_size;
        float& step = room.query_steps[static_cast<size_t>(query)];
        step = call.is_bf16 ? to_integers<Bf16>(static_cast<const bf16*>(call.q) + at, to) : to_integers<F32>(static_cast<const float*>(call.q) + at, to);
      } else {
        std::memcpy(to, static_cast<const T*>(call.q) + head_of(query) * head_size, sizeof(T) * static_cast<size_t>(head_size));
      }
      for (int64_t d = head_size; d < q_width; d++) to[d] = T{0};
    }
  }

  // A query as 16-bit integers, up to W - 1 more than it has; returns their step, which is NaN for one that is not finite.
  template <class E> float to_integers(const typename E::T* from, int16_t* to) const {
    F most = zero(), test = zero();
    for (int d = 0; d < head_size; d += W) {
      const F x = load_part<E>(from + d, head_size - d);
      most = vmax(most, vmax(x, sub(zero(), x))), test = add(test, mul(x, zero()));
    }
    const float span = top(most) + sum(test);
    const bool is_some = span >= 0x1p-100f && span < std::numeric_limits<float>::infinity();
    const F factor = set1(is_some ? Int8::MOST / span : 0.0f);
    for (int d = 0; d < head_size; d += W) store_int16(to + d, mul(load_part<E>(from + d, head_size - d), factor));
    return is_some ? span / Int8::MOST : span < 0x1p-100f ? 1.0f : std::numeric_limits<float>::quiet_NaN();
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

  // Calls fn(p, count, element offset of the keys and values of `head` at position start + p) for the blocks that are there from position `from` to `to`:
  // `count` positions, `stride()` apart.
  template <class Fn> void each_block(int of_row, int head, int start, int from, int to, Fn fn) const {
    const int32_t* table = call.tables + of_row * call.table_width;
    for (int at = std::max(start, from), block_end; at < to; at = block_end) {
      const int index = at / call.block_size;
      block_end = std::min(to, (index + 1) * call.block_size);
      if (table[index] < 0) continue;
      const int64_t slot = static_cast<int64_t>(table[index]) * call.block_size + at - index * call.block_size;
      fn(at - start, block_end - at, slot * stride() + static_cast<int64_t>(head) * head_size);
    }
  }
  int64_t stride() const { return static_cast<int64_t>(call.num_kv_heads) * head_size; }

  int64_t bytes_of(int heads) const { return static_cast<int64_t>(heads) * head_size * static_cast<int64_t>(sizeof(Cached)); }

  // Read every line of a split of the task's heads once, in the order of memory: the processor then reads ahead. What follows would wait for each line.
  void touch(int start, int from, int to) const {
    for (const void* cache : {call.k, call.v})
      each_block(row, kv_head, start, from, to, [&](int, int count, int64_t offset) {
        for (int i = 0; i < count; i++, offset += stride())
          for (int64_t at = 0; at < bytes_of(num_kv_heads); at += 64) (void)reinterpret_cast<const volatile char*>(static_cast<const Cached*>(cache) + offset)[at];
      });
  }

  // Have what this thread most likely reads next asked for while it computes: keys, then values of a split of this task or of another one.
  void look_ahead(const int32_t* of, int split) {
    ahead.begin();
    asked = {};
    if (of == nullptr) return;
    const bool is_own = of == task;
    if (!is_own && call.window > 0) return;
    const int head = std::max(0, of[1]), start = split * SPLIT, from = is_own ? std::max(start, begin_of(0)) : start;
    const int to = std::min(start + SPLIT, is_own ? last() + 1 : call.kv_lens[of[0]]);
    const int64_t bytes = bytes_of(of[1] == ALL ? call.num_kv_heads : 1), bytes_of_stride = bytes_of(call.num_kv_heads);
    for (const void* cache : {call.k, call.v})
      each_block(of[0], head, 0, from, to, [&](int, int count, int64_t offset) { ahead.add(static_cast<const Cached*>(cache) + offset, bytes, bytes_of_stride, count); });
    if constexpr (K::HAS_STEPS)
      for (const float* steps : {call.k_steps, call.v_steps})
        each_block(of[0], 0, 0, from, to, [&](int, int count, int64_t offset) {
          const int64_t of_all = call.num_kv_heads * count * static_cast<int64_t>(sizeof(float));
          ahead.add(steps + offset / head_size, of_all, of_all, 1);
        });
    asked = {call.k, of, split};
  }

  // Where keys and values of a split lie, of the task's first head; what is outside, which may never have been written, counts as zero.
  struct Found {
    const Cached* keys[SPLIT];
    const Cached* values[SPLIT];
    int begin, end;  // positions that a task sees, from the split's beginning; those up to the next multiple of NR can be read
  };
  void find(int start, int from, int to, Found& found) const {
    found.begin = std::max(0, from - start) / NR * NR, found.end = to - start;
    const int end = static_cast<int>(round_up(found.end, NR));
    const Cached *nothing = room.nothing.data(), *k = static_cast<const Cached*>(call.k), *v = static_cast<const Cached*>(call.v);
    std::fill(found.keys + found.begin, found.keys + end, nothing), std::fill(found.values + found.begin, found.values + end, nothing);
    if constexpr (K::HAS_STEPS)
      for (int head = 0; head < num_kv_heads; head++)
        for (Lines<float>* steps : {&room.key_steps, &room.value_steps}) std::fill_n(steps->data() + head * SPLIT + found.begin, end - found.begin, 0.0f);
    each_block(row, kv_head, start, from, to, [&](int p, int count, int64_t offset) {
      for (int i = p; i < p + count; i++, offset += stride()) {
        found.keys[i] = k + offset, found.values[i] = v + offset;
        if constexpr (K::HAS_STEPS)
          for (int64_t head = 0, of_first = offset / head_size; head < num_kv_heads; head++)
            room.key_steps[static_cast<size_t>(head * SPLIT + i)] = call.k_steps[of_first + head],
            room.value_steps[static_cast<size_t>(head * SPLIT + i)] = call.v_steps[of_first + head];
      }
    });
  }

  void pack(const Found& found, int head) {
    const int end = static_cast<int>(round_up(found.end, NR));
#if defined(__AVX512F__)
    if (head_size * sizeof(T) % 64 == 0) pack_keys_by_16(found, head, end);
    else
#endif
      for (int p = found.begin; p < end; p++) pack_key(found.keys[p] + head * head_size, p);
    for (int p = found.begin; p < end; p += K::P) {
      pack_values(found.values + p, head, p / K::P);
      if (p % 4 == 0) ahead.fetch(2 * bytes_of(num_kv_heads));
    }
  }

#if defined(__AVX512F__)
  void pack_keys_by_16(const Found& found, int head, int end) {  // 16 positions and 64 bytes of each at a time
    constexpr int64_t LINE = 64 / sizeof(T);
    for (int p = found.begin; p < end; p += 16)
      for (int64_t d = 0; d < head_size; d += LINE) {
        T* to = keys.data() + (p / NR) * (key_steps * NR * K::P) + (d / K::P * NR + p % NR) * K::P;
        ahead.fetch(2 * bytes_of(num_kv_heads));
        I turned[16];
        transpose16(found.keys + p, head * head_size + d, turned);
        for (int i = 0; i < 16; i++) storei(to + i * NR * K::P, turned[i]);
      }
  }
#endif

  void pack_key(const Cached* from, int p) {
    T* to = keys.data() + (p / NR) * (key_steps * NR * K::P) + (p % NR) * K::P;
    const int64_t whole_steps = head_size / K::P;
    for (int64_t s = 0; s < whole_steps; s++, to += NR * K::P)
      for (int i = 0; i < K::P; i++) to[i] = from[s * K::P + i];
    if (whole_steps < key_steps) {
      to[0] = from[head_size - 1];
      for (int i = 1; i < K::P; i++) to[i] = T{0};
    }
  }

  void pack_values(const Cached* const* from, int head, int64_t step) {
    for (int64_t panel = 0; panel < value_panels; panel++) {
      T* to = values.data() + panel * (SPLIT * NR) + step * NR * K::P;
      const int64_t at = head * head_size + panel * NR;
      const int count = static_cast<int>(std::min<int64_t>(NR, head_size - panel * NR));
#if defined(__AVX512F__)
      if constexpr (K::P == 2)
        if (count == NR) {
          I low, high;
          interleave32(from[0] + at, from[1] + at, low, high);
          storei(to, low), storei(to + NR, high);
          continue;
        }
#endif
      for (int i = 0; i < K::P; i++)
        for (int d = 0; d < NR; d++) to[d * K::P + i] = d < count ? static_cast<T>(from[i][at + d]) : T{0};
    }
  }

  // One split into `part`; most likely this thread has `next_split` of `next_task` after it.
  void run_split(int split, const int32_t* next_task, int next_split) {
    const int start = split * SPLIT, end = std::min(start + SPLIT, last() + 1);
    part.resize(num_queries, width);
    if (asked != Split{call.k, task, split}) touch(start, begin_of(0), end);
    look_ahead(next_task, next_split);
    Found found;
    find(start, begin_of(0), end, found);
#if defined(__AVX512F__)
    if constexpr (K::P == 2)
      if (per_head <= FEW && head_size % NR == 0) {
        with_rows<FEW>(per_head, [&]<int MR>() { split_of_few<MR>(start, found); });
        return finish_ahead();
      }
#endif
    for (int head = 0; head < num_kv_heads; head++) {
      pack(found, head);
      const int past_head = (head + 1) * per_head;
      for (int query = head * per_head; query < past_head; query += MAX_MR)
        with_rows(std::min(MAX_MR, past_head - query), [&]<int MR>() { tile<MR>(query, start, found); });
    }
    finish_ahead();
  }

  void finish_ahead() {  // what fewer tiles left
    while (ahead.has_more()) ahead.fetch(64);
  }

#if defined(__AVX512F__)
  // Few queries: keys are turned a panel of one head at a time, while those of the panel before it are multiplied, so that shuffles and products overlap;
  // values are turned in registers and used there. In the order of `tile`.
  template <int MR> void split_of_few(int start, const Found& found) {
    const int end = static_cast<int>(round_up(found.end, NR));
    T *current = keys.data(), *next = current + panel_size<K>(head_size);
    for (int64_t part_of = 0; part_of < head_size / 16; part_of++) turn(found, found.begin, 0, part_of, current);
    for (int p = found.begin; p < end; p += NR)
      for (int head = 0; head < num_kv_heads; head++) {
        const bool is_last_head = head + 1 == num_kv_heads;
        const int next_p = is_last_head ? p + NR : p, next_head = is_last_head ? 0 : head + 1;
        Sum c[MR][2];
        for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = Sum{};
        for (int64_t part_of = 0; part_of < head_size / 16; part_of++) {
          if (next_p < end) turn(found, next_p, next_head, part_of, next);
          const T *query = queries.data() + head * MR * q_width + part_of * 16, *key = current + part_of * 16 * NR;
#pragma GCC unroll 8
          for (int s = 0; s < 8; s++) {
            const I low = loadi(key + s * NR * 2), high = loadi(key + s * NR * 2 + NR);
            ahead.fetch(), ahead.fetch();
#pragma GCC unroll 4
            for (int i = 0; i < MR; i++) {
              const I x = bcast(query + i * q_width + 2 * s);
              accumulate2(c[i][0], x, low), accumulate2(c[i][1], x, high);
            }
          }
        }
        store_scores<MR>(c, head, p, scores.data() + head * MR * SPLIT + p);
        std::swap(current, next);
      }
    soften(0, num_queries, start, found.begin, end);
    for (int head = 0; head < num_kv_heads; head++) {
      int64_t panel = 0;
      for (; panel + 2 <= value_panels; panel += 2) values_of_few<MR, 2>(head, panel, found, end);
      if (panel < value_panels) values_of_few<MR, 1>(head, panel, found, end);
    }
  }

  // The keys of one head at NR positions from p on, in as many parts as they have 16 elements: half of the positions, 32 elements of each.
  inline __attribute__((always_inline)) void turn(const Found& found, int p, int head, int64_t part_of, T* to) const {
    const int64_t half = part_of % 2 * 16, d = part_of / 2 * 32;
    I turned[16];
    transpose16(found.keys + p + half, head * head_size + d, turned);
#pragma GCC unroll 16
    for (int s = 0; s < 16; s++) storei(to + (d / 2 + s) * NR * 2 + half * 2, turned[s]);
  }

  template <int MR, int N> inline __attribute__((always_inline)) void values_of_few(int head, int64_t panel, const Found& found, int end) {
    Sum c[MR][N][2];
    for (int i = 0; i < MR; i++)
      for (int n = 0; n < N; n++) c[i][n][0] = c[i][n][1] = Sum{};
    const int64_t at = head * head_size + panel * NR;
    const T* weight = weights.data() + head * MR * SPLIT;
    for (int p = found.begin; p < end; p += 2) {
      I low[N], high[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; n++) {
        interleave_lanes(found.values[p] + at + n * NR, found.values[p + 1] + at + n * NR, low[n], high[n]);
        ahead.fetch(), ahead.fetch();
      }
#pragma GCC unroll 4
      for (int i = 0; i < MR; i++) {
        const I w = bcast(weight + i * SPLIT + p);
#pragma GCC unroll 2
        for (int n = 0; n < N; n++) accumulate2(c[i][n][0], w, low[n]), accumulate2(c[i][n][1], w, high[n]);
      }
    }
    for (int i = 0; i < MR; i++)
      for (int n = 0; n < N; n++) {
        F first, second;
        together(value_of(c[i][n][0], head * MR + i), value_of(c[i][n][1], head * MR + i), first, second);
        float* value = part.value.data() + (head * MR + i) * width + (panel + n) * NR;
        store(value, first), store(value + W, second);
      }
  }
#endif

  template <int MR> void tile(int query, int start, const Found& found) {
    const int end = static_cast<int>(round_up(std::clamp(position(query + MR - 1) + 1 - start, 0, found.end), NR));  // what the last of them sees
    for (int p = found.begin; p < end; p += NR) {
      Sum c[MR][2];
      for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = Sum{};
      multiply<K, MR>(queries.data() + query * q_width, q_width, keys.data() + p / NR * (key_steps * NR * K::P), key_steps, c);
      store_scores<MR>(c, query / per_head, p, scores.data() + p);
    }
    soften(query, MR, start, found.begin, end);
    for (int64_t panel = 0; panel < value_panels; panel++) {
      Sum c[MR][2];
      for (int i = 0; i < MR; i++) c[i][0] = c[i][1] = Sum{};
      multiply<K, MR>(weights.data() + found.begin, SPLIT, values.data() + panel * (SPLIT * NR) + found.begin * NR, (end - found.begin) / K::P, c);
      float* value = part.value.data() + query * width + panel * NR;
      unrolled<MR>([&](auto i) { store(value + i * width, value_of(c[i][0], i)), store(value + i * width + W, value_of(c[i][1], i)); });
    }
  }

  // Sums of some queries with NR positions from p on, as scores that lack only what all of a query's lack.
  template <int MR> inline __attribute__((always_inline)) void store_scores(const Sum (&c)[MR][2], int head, int p, float* to) const {
    if constexpr (K::HAS_STEPS) {
      const float* steps = room.key_steps.data() + head * SPLIT + p;
      const F first = load(steps), second = load(steps + W);
      unrolled<MR>([&](auto i) { store(to + i * SPLIT, mul(to_float(c[i][0]), first)), store(to + i * SPLIT + W, mul(to_float(c[i][1]), second)); });
    } else {
      for (int i = 0; i < MR; i++) store(to + i * SPLIT, c[i][0]), store(to + i * SPLIT + W, c[i][1]);
    }
  }

  // What a sum of weights times values stands for. query: as `soften` counted them.
  inline __attribute__((always_inline)) F value_of(Sum c, int query) const {
    if constexpr (K::HAS_STEPS) return mul(to_float(c), set1(room.weight_steps[static_cast<size_t>(query)]));
    else return c;
  }

  // Scores of some queries over positions `begin` to `end` of a split to weights, relative to the greatest score of each. What a query does not see weighs nothing.
  // Scores count in powers of two from here on.
  void soften(int query, int count, int start, int begin, int end) {
    const bool is_plain = call.soft_cap <= 0 && call.scale > 0, asks = num_kv_heads == 1;
    for (int i = 0; i < count; i++) {
      const float scale = scale_of(query + i), factor = is_plain ? scale * LOG2_E : 1.0f;
      float* s = scores.data() + i * SPLIT;
      const int from = std::max(begin, begin_of(query + i) - start), to = std::min(end, position(query + i) + 1 - start), first = from / W * W;
      if (!is_plain)
        for (int n = first; n < to; n += W) store(s + n, mul(cap(mul(load(s + n), set1(scale))), set1(LOG2_E)));
      if (first < from && from < to) store(s + first, within(load(s + first), from - first, W, NONE));
      if (const int last = to / W * W; last < to && from < to) store(s + last, within(load(s + last), 0, to - last, NONE));
      F most = set1(NONE);
      for (int n = first; n < to; n += W) {
        most = vmax(most, load(s + n));
        if (asks) ahead.fetch();
      }
      part.top[static_cast<size_t>(query + i)] = factor * top(most);
    }
    for (int i = 0; i < count; i++) {
      float* s = scores.data() + i * SPLIT;
      const float now = part.top[static_cast<size_t>(query + i)];
      T* weight = weights.data() + i * SPLIT;
      const bool is_seen = now != NONE;
      const int from = is_seen ? std::min(end, std::max(begin, begin_of(query + i) - start) / W * W) : end, to = is_seen ? std::min(end, position(query + i) + 1 - start) : end;
      std::fill(weight + begin, weight + from, T{0});
      F total = zero();
      const F by = set1(is_plain ? scale_of(query + i) * LOG2_E : 1.0f), less = set1(-now);
      int n = from;
      if constexpr (K::HAS_STEPS) {
        total = integer_weights(s, weight, from, to, by, less, query, i), n = std::max(from, static_cast<int>(round_up(to, W)));
      } else {
        for (; n < to; n += W) {
          const F w = K::weight(fma(load(s + n), by, less));
          total = add(total, w);
          K::from_weight(weight + n, w);
        }
      }
      if (n < end) std::fill(weight + n, weight + end, T{0});
      part.total[static_cast<size_t>(query + i)] = sum(total);
    }
  }

  float scale_of(int query) const {
    if constexpr (K::HAS_STEPS) return call.scale * room.query_steps[static_cast<size_t>(query)];
    else return call.scale;
  }

  // Scores s of query + i from `from` to `to` as integer weights, each times its values' step; returns sums of the weights by lane. What weighs nothing
  // counts nothing, whatever its step: it may be of a position that this query does not see.
  F integer_weights(float* s, T* weight, int from, int to, F by, F less, int query, int i) {
    const float* steps = room.value_steps.data() + (query + i) / per_head * SPLIT;
    F total = zero(), most = zero();
    for (int n = from; n < to; n += W) {
      const F score = load(s + n), w = K::weight(fma(score, by, less)), x = from_on(w, std::numeric_limits<float>::min(), mul(w, load(steps + n)));
      store(s + n, x);
      const F test = mul(add(vmax(set1(LEAST), score), x), zero());  // 0 times what is not finite is NaN; what is hidden, -inf, is finite so
      most = vmax(most, x), total = add(total, add(w, test));
    }
    const float span = top(most);
    const F factor = set1(span > 0x1p-100f ? Int8::MOST / span : 0.0f);
    for (int n = from; n < to; n += W) store_int16(weight + n, mul(load(s + n), factor));
    room.weight_steps[static_cast<size_t>(i)] = span / Int8::MOST;
    return total;
  }

  F cap(F x) const {  // soft_cap * tanh(x / soft_cap), by e**(2y); tanh is 1 from 15 on in float32
    if (call.soft_cap <= 0) return x;
    const F y = vmax(set1(-15.0f), vmin(set1(15.0f), div(x, set1(call.soft_cap))));  // in this order NaN stays NaN
    const F e = vexp(add(y, y));
    return mul(set1(call.soft_cap), div(sub(e, set1(1.0f)), add(e, set1(1.0f))));
  }

  // Another part of the same queries joins `whole`.
  void merge(const State& other) {
    const auto rounded = round_up(num_queries, W);
    room.factors.resize(static_cast<size_t>(2 * rounded));
    float *old = room.factors.data(), *own = old + rounded;
    for (int64_t q = 0; q < rounded; q += W) {
      const F before = load(whole.top.data() + q), top = load(other.top.data() + q), now = vmax(vmax(before, top), set1(LEAST));
      const F f = vexp2<6>(sub(before, now)), g = vexp2<6>(sub(top, now));
      store(old + q, f), store(own + q, g), store(whole.top.data() + q, vmax(before, top));
      store(whole.total.data() + q, fma(load(other.total.data() + q), g, mul(load(whole.total.data() + q), f)));
    }
    for (int query = 0; query < num_queries; query++) {
      const float* value = other.value.data() + query * width;
      float* into = whole.value.data() + query * width;
      const F f = set1(old[query]), g = set1(own[query]);
      for (int64_t d = 0; d < width; d += W) store(into + d, fma(load(value + d), g, mul(load(into + d), f)));
    }
  }

  void write() {
    for (int query = 0; query < num_queries; query++) {
      const float* value = whole.value.data() + query * width;
      const F factor = set1(1.0f / whole.total[static_cast<size_t>(query)]);
      const int64_t at = head_of(query) * head_size;
      if constexpr (!K::HAS_STEPS) write_row<typename K::Element>(value, factor, at);
      else if (call.is_bf16) write_row<Bf16>(value, factor, at);
      else write_row<F32>(value, factor, at);
    }
  }
  template <class E> void write_row(const float* value, F factor, int64_t at) const {
    auto* to = static_cast<typename E::T*>(call.out) + at;
    for (int d = 0; d < head_size; d += W) store_part<E>(to + d, mul(load(value + d), factor), head_size - d);
  }

  void run(const int32_t* taken, const int32_t* following) {
    take(taken);
    const int first_of_all = first_split(), past_all = num_splits();
    for (int split = first_of_all; split < past_all; split++) {
      run_split(split, split + 1 < past_all ? task : following, split + 1 < past_all ? split + 1 : 0);
      if (split == first_of_all) std::swap(whole, part);
      else merge(part);
    }
    write();
  }
};

}  // namespace xllm
