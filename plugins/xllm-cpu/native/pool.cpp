// A worker that has nothing to do looks for work for one or two hundred microseconds, as long as the pause between two ops of a step, then sleeps:
// between steps, and between requests, it costs nothing. Pieces are taken from a counter, so a core that was taken away slows a job down
// by the piece it holds and no more: nobody waits for a thread that has not come.
#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
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

struct Pool {
  std::vector<std::thread> threads;
  std::atomic<uint64_t> job{0};  // odd: a job is open
  std::atomic<int64_t> next{0};
  std::atomic<int> inside{0};  // workers that may be reading the fields below
  std::atomic<int> asleep{0};
  std::atomic<bool> ends{false};
  int64_t count = 0;
  void* context = nullptr;
  Piece piece = nullptr;
  std::mutex mutex;
  std::condition_variable wake;

  explicit Pool(int workers) {
    for (int i = 0; i < workers; i++) threads.emplace_back([this] { work(); });
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

  void take() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) piece(context, i);
  }

  void work() {
    uint64_t seen = 0;
    for (;;) {
      for (int spin = 0; spin < SPINS && job.load(std::memory_order_acquire) == seen; spin++) XLLM_PAUSE();
      if (job.load(std::memory_order_acquire) == seen) {
        std::unique_lock<std::mutex> lock(mutex);
        asleep.fetch_add(1);
        wake.wait(lock, [&] { return job.load() != seen; });
        asleep.fetch_sub(1);
      }
      if (ends.load()) return;
      inside.fetch_add(1);  // before looking at `job`: either we see that it was closed, or its owner sees us inside and waits
      seen = job.load();
      if (seen & 1) take();
      inside.fetch_sub(1);
    }
  }

  void run(int64_t pieces, void* with, Piece what) {
    count = pieces, context = with, piece = what;
    next.store(0, std::memory_order_relaxed);
    job.fetch_add(1);
    if (asleep.load() > 0) {
      std::lock_guard<std::mutex> lock(mutex);
      wake.notify_all();
    }
    take();
    job.fetch_add(1);
    for (int spin = 0; inside.load() > 0; spin++) {
      if (spin < SPINS) XLLM_PAUSE();
      else std::this_thread::yield();
    }
  }
};

Pool* pool = nullptr;
int wanted = 1;
pid_t owner = 0;

}  // namespace

int num_threads() { return wanted; }

void set_num_threads(int count) {
  if (pool != nullptr && owner == getpid()) delete pool;
  pool = nullptr;
  wanted = count < 1 ? 1 : count;
}

void parallel(int64_t count, void* context, Piece piece) {
  if (wanted == 1) {
    for (int64_t i = 0; i < count; i++) piece(context, i);
    return;
  }
  if (pool == nullptr || owner != getpid()) {  // a forked child has none of its parent's threads
    pool = new Pool(wanted - 1);
    owner = getpid();
  }
  pool->run(count, context, piece);
}

}  // namespace xllm
