// Jobs and new pools in turns, while each worker is held up before every count that it raises, as a busy machine may do. Says "hung" if nothing moves
// any more. The standard's headers come first: afterwards `fetch_add` means the pool's.
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {
thread_local bool is_caller = false;
int held_up(int count) {
  thread_local uint32_t random = 1;
  random = random * 1664525 + 1013904223;
  if (!is_caller) std::this_thread::sleep_for(std::chrono::microseconds(random >> 24));
  return count;
}
}  // namespace

#define fetch_add(count) fetch_add(held_up(count))
#include "pool.cpp"
#undef fetch_add

int main(int, char** arguments) {
  is_caller = true;
  const int64_t rounds = std::atoi(arguments[1]);
  std::atomic<int64_t> num_rounds{0}, num_pieces{0};
  std::thread([&] {
    is_caller = true;
    for (int64_t last = -1, now; (now = num_rounds.load()) != last; last = now) std::this_thread::sleep_for(std::chrono::seconds(5));
    std::printf("hung in round %ld\n", static_cast<long>(num_rounds.load()));
    std::fflush(stdout);
    std::_Exit(1);
  }).detach();
  for (; num_rounds < rounds; num_rounds += 1) {
    for (int i = 0; i < 3; i++) xllm::parallel(2, &num_pieces, [](void* counted, int64_t) { *static_cast<std::atomic<int64_t>*>(counted) += 1; });
    xllm::set_num_threads(3);
  }
  std::printf("%s\n", num_pieces == rounds * 6 ? "whole" : "pieces are missing");
  std::fflush(stdout);
  std::_Exit(num_pieces != rounds * 6);
}
