// Threads that share one job at a time. Which thread takes which piece never changes a result: a piece is computed whole, by one thread.
#pragma once

#include <algorithm>
#include <cstdint>

namespace xllm {

using Piece = void (*)(void* context, int64_t piece);

// Run `piece(context, 0 .. count - 1)` on the caller and the pool's threads; returns when all are done. Callers take
// turns; a piece must not call it.
void parallel(int64_t count, void* context, Piece piece);

// Which of a job's threads this one is: 0 for the caller, from 1 on for the pool's.
int thread_index();

// Threads a job has, the caller's included. Setting it joins the old ones.
int num_threads();
void set_num_threads(int count);

template <class Fn> void parallel_for(int64_t count, Fn&& fn) {
  if (count <= 1) {
    if (count == 1) fn(int64_t{0});
    return;
  }
  parallel(count, &fn, [](void* context, int64_t piece) { (*static_cast<Fn*>(context))(piece); });
}

// fn(0), ..., fn(rows - 1), each of about `size` simple steps, in pieces of so many rows that handing one over costs little beside it.
template <class Fn> void for_rows(int64_t rows, int64_t size, Fn&& fn) {
  const int64_t least = std::max<int64_t>(1, 8192 / std::max<int64_t>(1, size));
  const int64_t grain = std::max(least, (rows + 4 * num_threads() - 1) / (4 * num_threads()));
  parallel_for((rows + grain - 1) / grain, [&](int64_t piece) {
    const int64_t end = std::min(rows, (piece + 1) * grain);
    for (int64_t row = piece * grain; row < end; row++) fn(row);
  });
}

}  // namespace xllm
