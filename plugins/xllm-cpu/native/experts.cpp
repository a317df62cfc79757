// Gated experts: every token through the experts it was sent to. Tokens are grouped by expert, so that each weight is read once however many
// tokens want it; pieces are (expert, some panels), so that threads share experts and the products of one.
//
// Limits. Few tokens: the bytes of the experts that are wanted. Many: 6 * tokens * K * H * I operations.
#include <algorithm>
#include <vector>

#include "api.h"
#include "linear.h"
#include "pool.h"

namespace xllm {
namespace {

template <class T> struct Room {  // kept by its thread from call to call
  std::vector<T> x, inner, out;
};

template <class E> void all_experts(const Call<E>& first, const int64_t* starts, int64_t num_experts, int64_t packed_size) {
  const int64_t panels = num_panels(first.n, first.fuses), grain = std::max<int64_t>(1, panels / (2 * num_threads()));
  const int64_t groups = (panels + grain - 1) / grain;
  parallel_for(num_experts * groups, [&](int64_t piece) {
    const int64_t expert = piece / groups, group = piece % groups, from = starts[expert], count = starts[expert + 1] - from;
    if (count == 0) return;
    Call<E> call = first;
    call.x += from * call.ldx, call.out = static_cast<typename E::T*>(call.out) + from * call.ldo, call.packed += expert * packed_size, call.m = count;
    call.panels(group * grain, std::min(panels, (group + 1) * grain));
  });
}

template <class E>
void run(
    const typename E::T* x, const int64_t* ids, const float* weights, int64_t* counts, const typename E::T* gate_up, const typename E::T* down,
    typename E::T* out, int64_t tokens, int64_t top_k, int64_t num_experts, int64_t hidden, int64_t inner) {
  using T = typename E::T;
  thread_local Room<T> kept;
  Room<T>& room = kept;  // the caller's, for all threads that help
  const int64_t ldx = round_up(hidden, E::P), ldi = round_up(inner, E::P);
  std::vector<int64_t> starts(static_cast<size_t>(num_experts + 1)), place(static_cast<size_t>(tokens * top_k));
  for (int64_t i = 0; i < tokens * top_k; i++)
    if (ids[i] >= 0) starts[static_cast<size_t>(ids[i] + 1)]++, counts[ids[i]]++;
  for (int64_t e = 0; e < num_experts; e++) starts[static_cast<size_t>(e + 1)] += starts[static_cast<size_t>(e)];
  std::vector<int64_t> next(starts.begin(), starts.end() - 1);
  for (int64_t i = 0; i < tokens * top_k; i++) place[static_cast<size_t>(i)] = ids[i] >= 0 ? next[static_cast<size_t>(ids[i])]++ : -1;
  const int64_t rows = starts[static_cast<size_t>(num_experts)];
  room.x.assign(static_cast<size_t>(rows * ldx), T{0});  // odd widths are read in pairs: what is behind them is zero
  room.inner.assign(static_cast<size_t>(rows * ldi), T{0});
  room.out.resize(static_cast<size_t>(rows * hidden));
  parallel_for(tokens, [&](int64_t t) {
    for (int64_t k = 0; k < top_k; k++)
      if (const int64_t row = place[static_cast<size_t>(t * top_k + k)]; row >= 0)
        std::memcpy(room.x.data() + row * ldx, x + t * hidden, sizeof(T) * static_cast<size_t>(hidden));
  });
  const int64_t up_size = num_panels(2 * inner, true) * panel_size<E>(hidden), down_size = num_panels(hidden, false) * panel_size<E>(inner);
  all_experts<E>({room.x.data(), gate_up, nullptr, room.inner.data(), 0, 2 * inner, hidden, ldx, ldi, true, false}, starts.data(), num_experts, up_size);
  all_experts<E>({room.inner.data(), down, nullptr, room.out.data(), 0, hidden, inner, ldi, hidden, false, false}, starts.data(), num_experts, down_size);
  parallel_for(tokens, [&](int64_t t) {
    for (int64_t d = 0; d < hidden; d += W) {
      F total = zero();
      for (int64_t k = 0; k < top_k; k++)
        if (const int64_t row = place[static_cast<size_t>(t * top_k + k)]; row >= 0)
          total = add(total, mul(set1(weights[t * top_k + k]), load_part<E>(room.out.data() + row * hidden + d, hidden - d)));
      store_part<E>(out + t * hidden + d, total, hidden - d);
    }
  });
}

}  // namespace
}  // namespace xllm

using namespace xllm;

int xllm_experts(
    const void* x, const int64_t* ids, const float* weights, int64_t* counts, const void* gate_up, const void* down, void* out, int64_t tokens,
    int64_t top_k, int64_t num_experts, int64_t hidden, int64_t inner, int is_bf16) {
  for (int64_t i = 0; i < tokens * top_k; i++)
    if (ids[i] < -1 || ids[i] >= num_experts) return static_cast<int>(i + 1);
  if (is_bf16)
    run<Bf16>(
        static_cast<const bf16*>(x), ids, weights, counts, static_cast<const bf16*>(gate_up), static_cast<const bf16*>(down), static_cast<bf16*>(out),
        tokens, top_k, num_experts, hidden, inner);
  else
    run<F32>(
        static_cast<const float*>(x), ids, weights, counts, static_cast<const float*>(gate_up), static_cast<const float*>(down),
        static_cast<float*>(out), tokens, top_k, num_experts, hidden, inner);
  return 0;
}
