// Which experts a token goes to, by its scores: sigmoid, correction, the best groups, the best experts in them. A row is one thread's, and sigmoid is
// computed in whole vectors whatever the number of experts, so that a number's last bit does not depend on where it stands.
//
// Limits: an exponential per score, then one comparison for each but the few that are better than the worst chosen so far.
#include <algorithm>
#include <vector>

#include "api.h"
#include "pool.h"
#include "vec.h"

namespace xllm {
namespace {

struct Scored {
  float score;
  int64_t id;
};

inline bool is_better(float a, float b) { return a > b || (a != a && b == b); }  // NaN before any number, as torch sorts

// The best of those offered, the best first; of equal ones the one that was offered first.
class Best {
 public:
  void begin(int64_t most) {
    most_ = most, count_ = 0;
    if (kept_.size() < static_cast<size_t>(most)) kept_.resize(static_cast<size_t>(most));
  }
  void offer(float score, int64_t id) {
    Scored* kept = kept_.data();
    if (count_ == most_ && !is_better(score, kept[count_ - 1].score)) return;
    int64_t at = count_ < most_ ? count_++ : count_ - 1;
    for (; at > 0 && is_better(score, kept[at - 1].score); at--) kept[at] = kept[at - 1];
    kept[at] = {score, id};
  }
  const Scored& operator[](int64_t i) const { return kept_[static_cast<size_t>(i)]; }

 private:
  std::vector<Scored> kept_;
  int64_t most_ = 0, count_ = 0;
};

struct Room {  // kept from row to row
  std::vector<float> p, ranked;
  std::vector<unsigned char> is_allowed;
  Best groups, experts;
};

struct Router {
  int64_t num_experts, top_k, num_groups, top_groups;
  const float* correction;
  bool is_normalised;
  float scaling;

  void operator()(const float* scores, int64_t* ids, float* weights) const {
    thread_local Room room;
    const auto padded = static_cast<size_t>((num_experts + W - 1) / W * W);
    if (room.p.size() < padded) room.p.resize(padded), room.ranked.resize(padded);
    float *p = room.p.data(), *ranked = room.ranked.data();
    for (int64_t i = 0; i < num_experts; i += W) {
      const F x = load_part<F32>(scores + i, num_experts - i), y = div(set1(1.0f), add(set1(1.0f), vexp(sub(zero(), x))));
      store(p + i, y);
      store(ranked + i, add(y, load_part<F32>(correction + i, num_experts - i)));
    }
    for (int64_t i = 0; i < num_experts; i++)  // which the exponential passes over
      if (scores[i] != scores[i]) p[i] = ranked[i] = scores[i];
    const int64_t size = num_experts / num_groups;
    choose_groups(room, size);
    room.experts.begin(top_k);
    for (int64_t g = 0; g < num_groups; g++)
      for (int64_t i = g * size; i < (g + 1) * size && room.is_allowed[static_cast<size_t>(g)]; i++) room.experts.offer(ranked[i], i);
    float total = 0.0f;
    for (int64_t k = 0; k < top_k; k++) ids[k] = room.experts[k].id, total += weights[k] = p[ids[k]];
    for (int64_t k = 0; k < top_k; k++) weights[k] = (is_normalised ? weights[k] / (total + 1e-20f) : weights[k]) * scaling;
  }

  void choose_groups(Room& room, int64_t size) const {
    room.is_allowed.assign(static_cast<size_t>(num_groups), top_groups == num_groups);
    if (top_groups == num_groups) return;
    room.groups.begin(top_groups);
    for (int64_t g = 0; g < num_groups; g++) {
      room.experts.begin(2);
      for (int64_t i = g * size; i < (g + 1) * size; i++) room.experts.offer(room.ranked[static_cast<size_t>(i)], i);
      room.groups.offer(room.experts[0].score + room.experts[1].score, g);
    }
    for (int64_t i = 0; i < top_groups; i++) room.is_allowed[static_cast<size_t>(room.groups[i].id)] = 1;
  }
};

}  // namespace
}  // namespace xllm

using namespace xllm;

int xllm_moe_route(
    const float* scores, int64_t lds, const float* correction, int64_t* ids, float* weights, int64_t rows, int64_t num_experts, int64_t top_k,
    int64_t num_groups, int64_t top_groups, int is_normalised, float scaling) {
  const Router route{num_experts, top_k, num_groups, top_groups, correction, is_normalised != 0, scaling};
  for_rows(rows, 8 * num_experts, [&](int64_t row) { route(scores + row * lds, ids + row * top_k, weights + row * top_k); });
  return 0;
}
