// Token choice: argmax, or argmax of tempered, filtered and noised scores, as the core's sampler defines it (`xllm_core.runtime.sampler`).
//
// A row is one thread's. Noise is a hash of (stream, token) turned into a Gumbel variable g = -log(-log1p(-u)); since -log1p(-u) >= u, it is at
// most -log(u), and a token whose score is s can only win where u <= exp(s - best). That is one hash and one vector exp per token; the two
// logarithms are taken for the handful that pass. Filters end at a score: counts and masses of 2,048 bins tell in which it lies, and only that
// bin is sorted.
//
// Limits: 4 bytes a token and pass from the second-level cache; some 60 operations a token for the hash.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "api.h"
#include "pool.h"
#include "vec.h"

namespace xllm {
namespace {

constexpr uint64_t GAMMA = 0x9E3779B97F4A7C15u;
constexpr float NEVER = -std::numeric_limits<float>::infinity();
constexpr int BLOCK = 64;
constexpr int64_t STRETCH = 1024;
constexpr int LAST = 2047;         // bins of tempered scores for filters; the last holds all that is less likely than exp(-32)
constexpr float PER_UNIT = 64.0f;  // bins per unit

inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

inline uint64_t stream_key(int64_t seed, int64_t index, int64_t position) {
  uint64_t key = mix(static_cast<uint64_t>(seed) + GAMMA);
  key = mix(key + static_cast<uint64_t>(index) + GAMMA);
  return mix(key + static_cast<uint64_t>(position) + GAMMA);
}

inline float uniform(uint64_t key, int64_t token) {
  const uint64_t z = mix(key + static_cast<uint64_t>(token + 1) * GAMMA);
  const auto u = static_cast<float>((static_cast<double>(static_cast<int64_t>(z >> 11)) + 0.5) * 0x1p-53);
  return u < 1.0f - 0x1p-24f ? u : 1.0f - 0x1p-24f;
}

inline float gumbel(float u) { return -std::log(-std::log1p(-u)); }

struct Scored {
  float score;
  int64_t token;
};

float greatest(const float* x, int64_t vocab) {
  F most[4] = {set1(NEVER), set1(NEVER), set1(NEVER), set1(NEVER)};
  int64_t i = 0;
  for (; i + 4 * W <= vocab; i += 4 * W)
    for (int n = 0; n < 4; n++) most[n] = vmax(load(x + i + n * W), most[n]);  // NaN on the left is passed over
  float found = top(vmax(vmax(most[0], most[1]), vmax(most[2], most[3])));
  for (; i < vocab; i++) found = x[i] > found ? x[i] : found;
  return found;
}

// The first token with the greatest score; 0 where none is above "never". Looked for in the first stretch that has it alone.
int64_t argmax(const float* x, int64_t vocab) {
  float most = NEVER;
  int64_t start = 0;
  for (int64_t from = 0; from < vocab; from += STRETCH) {
    const float found = greatest(x + from, std::min(STRETCH, vocab - from));
    if (found > most) most = found, start = from;
  }
  for (int64_t i = start; i < vocab; i++)
    if (x[i] == most) return i;
  return 0;
}

class Row {
 public:
  Row(float* x, int64_t vocab, const XllmSampling& s, int64_t row)
      : x(x), vocab(vocab), key(stream_key(s.seeds[row], s.indices[row], s.positions[row])), top_k(s.top_k ? s.top_k[row] : 0),
        top_p(s.top_p ? s.top_p[row] : 1.0f), min_p(s.min_p ? s.min_p[row] : 0.0f) {
    const float most = greatest(x, vocab), temperature = s.temperature[row];
    for (int64_t i = 0; i < vocab; i++) x[i] = (x[i] - most) / temperature;
  }

  int64_t choose() {
    float floor = min_p > 0 ? std::log(min_p) : NEVER;
    if (top_k > 0 || top_p < 1.0f) floor = std::max(floor, filtered());
    return everywhere(floor);
  }

 private:
  float* x;  // tempered: the likeliest has 0
  const int64_t vocab;
  const uint64_t key;
  const int64_t top_k;
  const float top_p, min_p;

  static int bin_of(float score) { return score > -static_cast<float>(LAST) / PER_UNIT ? static_cast<int>(-score * PER_UNIT) : LAST; }

  // Scores of one bin, likeliest first.
  const std::vector<float>& sorted(int bin) const {
    thread_local std::vector<float> found;
    found.clear();
    for (int64_t i = 0; i < vocab; i++)
      if (x[i] > NEVER && bin_of(x[i]) == bin) found.push_back(x[i]);
    std::sort(found.begin(), found.end(), std::greater<float>());
    return found;
  }

  // The lowest score that top-k, then top-p within it, keep. Equals of it are kept too. Only the bin where a filter ends is sorted.
  float filtered() const {
    thread_local std::vector<int64_t> counts;
    thread_local std::vector<double> masses;
    counts.assign(LAST + 1, 0), masses.assign(LAST + 1, 0.0);
    for (int64_t first = 0; first < vocab; first += W) {
      float weight[W];
      store(weight, vexp(load_part<F32>(x + first, vocab - first)));
      for (int i = 0; i < W && first + i < vocab; i++)
        if (x[first + i] > NEVER) {
          const int bin = bin_of(x[first + i]);
          counts[static_cast<size_t>(bin)]++, masses[static_cast<size_t>(bin)] += weight[i];
        }
    }
    float lowest = NEVER;
    int last = LAST;  // the bin where top-k ends, of which `partial` is kept
    double partial = masses[LAST];
    if (top_k > 0) {
      int64_t left = top_k;
      for (last = 0; last < LAST && left > counts[static_cast<size_t>(last)]; last++) left -= counts[static_cast<size_t>(last)];
      const std::vector<float>& scores = sorted(last);
      partial = masses[static_cast<size_t>(last)];
      if (left <= static_cast<int64_t>(scores.size())) {
        lowest = scores[static_cast<size_t>(left - 1)], partial = 0;
        for (size_t i = 0; i < scores.size() && scores[i] >= lowest; i++) partial += std::exp(static_cast<double>(scores[i]));
      }
    }
    if (top_p >= 1.0f) return lowest;
    double total = partial;
    for (int bin = 0; bin < last; bin++) total += masses[static_cast<size_t>(bin)];
    double before = 0;
    const double wanted = total * static_cast<double>(top_p);
    int bin = 0;
    for (; bin < last && before + masses[static_cast<size_t>(bin)] < wanted; bin++) before += masses[static_cast<size_t>(bin)];
    for (const float score : sorted(bin)) {
      if (score < lowest) break;
      before += std::exp(static_cast<double>(score));
      if (before >= wanted) return score;
    }
    return lowest;
  }

  static Scored better(const Scored& best, float score, int64_t token) {
    return score > best.score || (score == best.score && token < best.token) ? Scored{score, token} : best;
  }

  int64_t everywhere(float floor) const {
    const int64_t likeliest = argmax(x, vocab);
    Scored best{x[likeliest] + gumbel(uniform(key, likeliest)), likeliest};
    for (int64_t first = 0; first < vocab; first += BLOCK) {
      const int count = static_cast<int>(std::min<int64_t>(BLOCK, vocab - first));
      float u[BLOCK], reach[BLOCK];
      for (int i = 0; i < BLOCK; i++) u[i] = uniform(key, first + i);
      for (int i = 0; i < BLOCK; i += W) store(reach + i, vexp(vmin(sub(load_part<F32>(x + first + i, i < count ? count - i : 0), set1(best.score)), set1(80.0f))));
      int hits = 0;
      for (int i = 0; i < BLOCK; i++) hits |= u[i] <= reach[i] * 1.001f;
      if (hits == 0) continue;
      for (int i = 0; i < count; i++)
        if (u[i] <= reach[i] * 1.001f && x[first + i] >= floor && x[first + i] > NEVER) best = better(best, x[first + i] + gumbel(u[i]), first + i);
    }
    return best.token;
  }
};

}  // namespace
}  // namespace xllm

using namespace xllm;

int xllm_sample(float* logits, int64_t rows, int64_t vocab, const XllmSampling* sampling, int64_t* out) {
  for (int64_t row = 0; sampling->temperature != nullptr && row < rows; row++)
    if (!(sampling->temperature[row] >= 0.0f)) return static_cast<int>(row + 1);
  parallel_for(rows, [&](int64_t row) {
    float* x = logits + row * vocab;
    const bool is_greedy = sampling->temperature == nullptr || sampling->temperature[row] == 0.0f;
    out[row] = is_greedy ? argmax(x, vocab) : Row(x, vocab, *sampling, row).choose();
  });
  return 0;
}
