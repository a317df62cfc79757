// A worker that has nothing to do looks for work for one or two hundred microseconds, as long as the pause between two ops of a step, then sleeps:
// between steps, and between requests, it costs nothing. Each thread has pieces that lie side by side, front to back, as what it asked memory for ahead
// of time is what it takes next; one that has none left takes the last of another's. So a core that was taken away slows a job down by the piece it
// holds and no more: nobody waits for a thread that has not come.
#include "pool.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#define XLLM_PAUSE() _mm_pause()
#else
#define XLLM_PAUSE() std::this_thread::yield()
#endif

namespace xllm {
namespace {

constexpr int SPINS = 12000;

thread_local int index_of_thread = 0;

// Pieces from `front` to before `back`, in one word so that one exchange takes either end.
class alignas(64) Range {
 public:
  void reset(int64_t front, int64_t back) { word_.store(pack(static_cast<uint32_t>(front), static_cast<uint32_t>(back)), std::memory_order_relaxed); }
  // The first piece or the last; -1 if there is none.
  int64_t take(bool is_first) {
    uint64_t word = word_.load(std::memory_order_relaxed);
    for (;;) {
      const auto front = static_cast<uint32_t>(word), back = static_cast<uint32_t>(word >> 32);
      if (front == back) return -1;
      const uint64_t rest = is_first ? pack(front + 1, back) : pack(front, back - 1);
      if (word_.compare_exchange_weak(word, rest, std::memory_order_relaxed)) return is_first ? front : back - 1;
    }
  }

 private:
  static uint64_t pack(uint32_t front, uint32_t back) { return static_cast<uint64_t>(back) << 32 | front; }
  std::atomic<uint64_t> word_{0};
};

struct Pool {
  std::vector<std::thread> threads;
  std::vector<Range> ranges;  // of the caller, then of each worker
  std::atomic<uint64_t> job{0};  // odd: a job is open
  std::atomic<int> inside{0};  // workers that may be reading the fields below
  std::atomic<int> asleep{0};
  std::atomic<bool> ends{false};
  void* context = nullptr;
  Piece piece = nullptr;
  std::mutex mutex;
  std::condition_variable wake;

  // As many workers as the system gives. What would have been the part of one that it refused is taken by the others.
  explicit Pool(int workers) : ranges(static_cast<size_t>(workers) + 1) {
    try {
      for (size_t i = 1; i < ranges.size(); i++) threads.emplace_back([this, i] { work(i); });
    } catch (const std::system_error&) {
    }
  }

  ~Pool() {
    ends.store(true);
    {
      std::lock_guard<std::mutex> lock(mutex);
      job.fetch_add(1);
    }
    wake.notify_all();
    for (auto& thread : threads) thread.join();
  }

  void take(size_t own) {
    for (int64_t i; (i = ranges[own].take(true)) >= 0;) piece(context, i);
    for (size_t step = 1; step < ranges.size(); step++)
      for (int64_t i; (i = ranges[(own + step) % ranges.size()].take(false)) >= 0;) piece(context, i);
  }

  void work(size_t own) {
    uint64_t seen = 0;
    index_of_thread = static_cast<int>(own);
    for (;;) {
      for (int spin = 0; spin < SPINS && job.load(std::memory_order_acquire) == seen; spin++) XLLM_PAUSE();
      if (job.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        asleep.fetch_add(1);
        wake.wait(lock, [&] { return job.load() != seen; });
        asleep.fetch_sub(1);
      }
      inside.fetch_add(1);  // before looking at `job`: either we see that it was closed, or its owner sees us inside and waits
      seen = job.load();
      if (ends.load()) return;  // after it: `ends` is set before `job` moves for the last time, and who has seen that waits for nothing more
      if (seen & 1) take(own);
      inside.fetch_sub(1);
    }
  }

  void run(int64_t pieces, void* with, Piece what) {
    context = with, piece = what;
    const auto size = static_cast<int64_t>(ranges.size());
    for (int64_t i = 0; i < size; i++) ranges[static_cast<size_t>(i)].reset(pieces * i / size, pieces * (i + 1) / size);
    job.fetch_add(1);
    if (asleep.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    take(0);
    job.fetch_add(1);
    for (int spin = 0; inside.load() > 0; spin++) {
      if (spin < SPINS) XLLM_PAUSE();
      else std::this_thread::yield();
    }
  }
};

// One job at a time: engines of one process take turns, op by op.
struct Shared {
  std::mutex turn;  // held for a whole job
  Pool* pool = nullptr;
};
Shared* shared = new Shared;
std::atomic<int> wanted{1};

// A forked child has none of its parent's threads, and perhaps a lock that one of them held.
[[maybe_unused]] const int told_of_forks = pthread_atfork(nullptr, nullptr, [] { shared = new Shared; });

}  // namespace

int thread_index() { return index_of_thread; }

int num_threads() { return wanted.load(std::memory_order_relaxed); }

void set_num_threads(int count) {
  std::lock_guard<std::mutex> lock(shared->turn);
  delete shared->pool;
  shared->pool = nullptr;
  wanted.store(count < 1 ? 1 : count);
}

void parallel(int64_t count, void* context, Piece piece) {
  if (num_threads() == 1) {
    for (int64_t i = 0; i < count; i++) piece(context, i);
    return;
  }
  std::lock_guard<std::mutex> lock(shared->turn);
  if (shared->pool == nullptr) shared->pool = new Pool(num_threads() - 1);
  shared->pool->run(count, context, piece);
}

}  // namespace xllm
