// RMSNorm over f16 or bf16 rows, with the residual stream's addition before it. A block takes a row: it reads it in 16-byte pieces,
// sums the squares in f32 in a fixed order, and reads the row again, from L1, to scale it.
#include "cuda/half.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kThreads = 256;  // 8 values each: one pass over rows of 2048, two over 4096

// The sum over a block's threads, known to all of them.
__device__ float sum_over_block(float v) {
  __shared__ float part[kThreads / 32];
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(0xffffffffu, v, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  float total = 0;
  for (int w = 0; w < kThreads / 32; ++w) total += part[w];
  return total;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
rmsnorm_kernel(const T* x, T* residual, const float* weight, T* y, int n, float eps) {
  ptx::dependency_release();
  ptx::dependency_wait();
  const size_t row = size_t(blockIdx.x) * n;
  float sum = 0;
  for (int c = threadIdx.x * 8; c < n; c += kThreads * 8) {
    float v[8];
    load8(x + row + c, v);
    if (residual) {
      float before[8];
      load8(residual + row + c, before);
      for (int i = 0; i < 8; ++i) v[i] += before[i];
      store8(residual + row + c, v);
    }
    for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
  }
  const float factor = rsqrtf(sum_over_block(sum) / float(n) + eps);
  const T* source = residual ? residual : x;
  for (int c = threadIdx.x * 8; c < n; c += kThreads * 8) {  // the very pieces that this thread has read and written above
    float v[8], scale[8];
    load8(source + row + c, v);
    load8(weight + c, scale);
    for (int i = 0; i < 8; ++i) v[i] *= factor * scale[i];
    store8(y + row + c, v);
  }
}

const char* refuses(const RmsNorm& op) {
  if (op.row) return "takes all rows";
  if (op.n % 8) return "n is no multiple of 8";
  if (!aligned16(op.x) || !aligned16(op.residual) || !aligned16(op.weight) || !aligned16(op.y)) return "a pointer is not 16-byte aligned";
  return nullptr;
}

void run(const RmsNorm& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    launch(rmsnorm_kernel<T>, dim3(unsigned(op.m)), dim3(kThreads), 0, stream, reinterpret_cast<const T*>(op.x),
           reinterpret_cast<T*>(op.residual), op.weight, reinterpret_cast<T*>(op.y), int(op.n), op.eps);
  });
}

const Row<RmsNorm> row{{"rmsnorm_sm80", Device::cuda, Arch::sm80, 1, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
