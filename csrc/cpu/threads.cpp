#include "cpu/threads.h"

#include <pthread.h>

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <exception>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace pe {
namespace {

void pause() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

// Longer than the sampling between two decode steps, far shorter than a scheduler's tick. Waking a sleeper takes 50 µs, and several
// times that on a virtual machine whose idle core has been given away.
constexpr std::chrono::microseconds kPatience{400};
constexpr int kPauses = 32;  // between two looks at the clock: 1 to 2 µs

// Spins until done() or patience runs out; returns whether it is done.
template <class Done>
bool spin(Done done) {
  for (const auto end = std::chrono::steady_clock::now() + kPatience; std::chrono::steady_clock::now() < end;)
    for (int i = 0; i < kPauses; ++i) {
      if (done()) return true;
      pause();
    }
  return done();
}

class Pool {
 public:
  explicit Pool(int workers) {
    try {
      for (int i = 0; i < workers; ++i) workers_.emplace_back([this] { work(); });
    } catch (const std::exception& e) {
      stop();
      throw std::runtime_error("cannot start " + std::to_string(workers) + " threads: " + e.what());
    }
  }

  ~Pool() { stop(); }

  int workers() const { return int(workers_.size()); }

  void run(int64_t count, int64_t grain, Task task, void* context) {
    task_ = task, context_ = context, count_ = count, grain_ = grain;
    next_.store(0, std::memory_order_relaxed);
    pending_.store(workers(), std::memory_order_relaxed);
    {
      std::lock_guard lock(mutex_);
      generation_.fetch_add(1, std::memory_order_release);
    }
    if (sleeping_.load(std::memory_order_seq_cst)) wake_.notify_all();
    drain();
    // Whatever a task threw, its context must outlive the workers that still use it.
    // A worker may be descheduled while it holds a piece: give way to it after a while instead of burning its core.
    const auto done = [&] { return !pending_.load(std::memory_order_acquire); };
    if (!spin(done))
      while (!done()) std::this_thread::yield();
    if (failed_) std::rethrow_exception(std::exchange(failed_, nullptr));
  }

 private:
  void stop() {
    {
      std::lock_guard lock(mutex_);
      stop_.store(true);
    }
    wake_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  void drain() {
    try {
      for (int64_t begin; (begin = next_.fetch_add(grain_, std::memory_order_relaxed)) < count_;)
        task_(context_, begin, std::min(begin + grain_, count_));
    } catch (...) {
      std::lock_guard lock(mutex_);
      failed_ = std::current_exception();
    }
  }

  void work() {
    for (uint64_t seen = 0;;) {
      if (!spin([&] { return generation_.load(std::memory_order_acquire) != seen; })) {
        std::unique_lock lock(mutex_);
        sleeping_.fetch_add(1);
        wake_.wait(lock, [&] { return stop_.load() || generation_.load() != seen; });
        sleeping_.fetch_sub(1);
      }
      if (stop_.load()) return;
      seen = generation_.load(std::memory_order_acquire);
      drain();
      pending_.fetch_sub(1, std::memory_order_release);
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_;
  std::atomic<uint64_t> generation_{0};
  std::atomic<int> sleeping_{0}, pending_{0};
  std::atomic<bool> stop_{false};
  std::atomic<int64_t> next_{0};
  std::exception_ptr failed_;
  Task task_ = nullptr;
  void* context_ = nullptr;
  int64_t count_ = 0, grain_ = 1;
};

// The cores this process may use, which a container or taskset makes fewer than there are.
int cores() {
  cpu_set_t set;
  const int allowed = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : int(std::thread::hardware_concurrency());
  return std::clamp(allowed, 1, kMostThreads);
}

std::mutex turn;
std::atomic<int> wanted = cores();  // read before the turn is taken
std::unique_ptr<Pool> pool;

// A forked child inherits no threads: forget the parent's pool (leaked on purpose) and start one when it is needed.
void after_fork() {
  (void)pool.release();
  new (&turn) std::mutex;
}
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, after_fork);

}  // namespace

void parallel_for(int64_t count, int64_t grain, Task task, void* context) {
  grain = std::max<int64_t>(grain, 1);
  if (count <= grain || wanted == 1) {
    if (count > 0) task(context, 0, count);
    return;
  }
  std::lock_guard lock(turn);
  if (!pool || pool->workers() != wanted - 1) {
    pool.reset();
    pool = std::make_unique<Pool>(wanted - 1);
  }
  pool->run(count, grain, task, context);
}

int threads() { return wanted; }

void set_threads(int count) {
  std::lock_guard lock(turn);
  wanted = std::clamp(count, 1, kMostThreads);
}

}  // namespace pe
