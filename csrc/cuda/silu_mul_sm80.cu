// SiLU·mul over f16 or bf16 rows that hold gate and up side by side: eight values a thread, in f32.
#include "cuda/half.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kThreads = 128;

template <class T>
__global__ void __launch_bounds__(kThreads)
silu_mul_kernel(const T* x, T* y, int n) {
  ptx::dependency_release();
  ptx::dependency_wait();
  const int c = (blockIdx.y * kThreads + threadIdx.x) * 8;
  if (c >= n) return;
  float gate[8], up[8];
  const T* row = x + size_t(blockIdx.x) * 2 * n;
  load8(row + c, gate);
  load8(row + n + c, up);
  // A gate below −88 makes the exponential infinite and the quotient 0, as it should.
  for (int i = 0; i < 8; ++i) gate[i] = gate[i] / (1 + __expf(-gate[i])) * up[i];
  store8(y + size_t(blockIdx.x) * n + c, gate);
}

const char* refuses(const SiluMul& op) {
  if (op.n % 8) return "n is no multiple of 8";
  return aligned16(op.x) && aligned16(op.y) ? nullptr : "a pointer is not 16-byte aligned";
}

void run(const SiluMul& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    const dim3 grid(unsigned(op.m), unsigned((op.n + kThreads * 8 - 1) / (kThreads * 8)));
    launch(silu_mul_kernel<T>, grid, dim3(kThreads), 0, stream, reinterpret_cast<const T*>(op.x), reinterpret_cast<T*>(op.y), int(op.n));
  });
}

const Row<SiluMul> row{{"silu_mul_sm80", Device::cuda, Arch::sm80, 1, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
