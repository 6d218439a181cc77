// One pool of threads for all CPU kernels. A worker spins briefly after its work, since the next op follows within microseconds
// at decode, then sleeps, so that it does not take a core from torch's own threads.
#pragma once

#include <cstdint>
#include <type_traits>

namespace pe {

using Task = void (*)(void* context, int64_t begin, int64_t end);

// Calls task over [0, count) in pieces of `grain`, on the pool and on the caller; returns when all is done. Pieces are taken in any
// order, so a task must not depend on it. Calls from several threads take turns. What a task throws comes out here.
void parallel_for(int64_t count, int64_t grain, Task task, void* context);

template <class F>
void parallel_for(int64_t count, int64_t grain, F&& body) {
  using Body = std::remove_reference_t<F>;
  parallel_for(count, grain, [](void* c, int64_t b, int64_t e) { (*static_cast<Body*>(c))(b, e); }, &body);
}

int threads();
constexpr int kMostThreads = 1024;
void set_threads(int count);  // 1 … kMostThreads; the caller's thread counts

}  // namespace pe
