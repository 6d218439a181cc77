// The next token of each row of f16 or bf16 logits: the largest, or a draw by the exponential race (ops.h, Sample). A block takes a row.
// It reads it once for the largest logit and, to draw, once more from L2, with random numbers that it computes as it goes.
#include "cuda/half.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"
#include "random.h"

namespace pe {
namespace {

constexpr int kThreads = 512;

// The largest key so far and whose it is: the first of equals.
struct Best {
  float key = -INFINITY;
  int token = INT_MAX;

  __device__ void add(float k, int c) {
    if (k > key || (k == key && c < token)) key = k, token = c;
  }
};

// The best of all threads, known to all of them.
__device__ Best best_of_block(Best best) {
  __shared__ Best part[kThreads / 32];
  for (int step = 16; step > 0; step /= 2)
    best.add(__shfl_xor_sync(0xffffffffu, best.key, step), __shfl_xor_sync(0xffffffffu, best.token, step));
  __syncthreads();  // nobody still reads the parts of the time before
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = best;
  __syncthreads();
  for (const Best& other : part) best.add(other.key, other.token);
  return best;
}

// Calls visit(c, v) for the thread's pieces of eight logits from c on; what is beyond the last one is −infinity.
template <class T, class F>
__device__ void each_piece(const T* row, int n, F&& visit) {
  for (int c = threadIdx.x * 8; c < n; c += kThreads * 8) {
    float v[8];
    if (c + 8 <= n)
      load8(row + c, v);
    else
      for (int j = 0; j < 8; ++j) v[j] = c + j < n ? float(row[c + j]) : -INFINITY;
    visit(c, v);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
sample_kernel(const __grid_constant__ Sample op) {
  ptx::dependency_release();
  ptx::dependency_wait();
  const T* row = reinterpret_cast<const T*>(op.logits) + blockIdx.x * op.stride;
  Best largest;
  bool broken = false;
  each_piece(row, int(op.n), [&](int c, const float (&v)[8]) {
    for (int j = 0; j < 8; ++j) {
      broken |= !(v[j] < INFINITY);
      if (v[j] > largest.key) largest.key = v[j], largest.token = c + j;
    }
  });
  broken = __syncthreads_or(broken);
  Best best = largest = best_of_block(largest);
  const float temperature = op.temperature ? op.temperature[blockIdx.x] : 0;
  if (temperature > 0) {
    const uint64_t key = uint64_t(op.seed[blockIdx.x]);
    const uint32_t position = uint32_t(op.position[blockIdx.x]);
    best = Best();
    each_piece(row, int(op.n), [&](int c, const float (&v)[8]) {
      for (int half = 0; half < 2; ++half) {
        const auto four = random::philox({{uint32_t(c / 4 + half), position, 0, 0}}, key);
        for (int j = 0; j < 4; ++j) {
          const float k = random::race((v[half * 4 + j] - largest.key) / temperature, four.word[j]);
          if (k > best.key) best.key = k, best.token = c + half * 4 + j;
        }
      }
    });
    best = best_of_block(best);
  }
  if (threadIdx.x == 0) op.token[blockIdx.x] = broken || best.key == -INFINITY ? -1 : best.token;
}

const char* refuses(const Sample& op) {
  return aligned16(op.logits) && op.stride % 8 == 0 ? nullptr : "rows of logits are not 16-byte aligned";
}

void run(const Sample& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) { launch(sample_kernel<T>, dim3(unsigned(op.m)), dim3(kThreads), 0, stream, op); });
}

const Row<Sample> row{{"sample_sm80", Device::cuda, Arch::sm80, 1, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
