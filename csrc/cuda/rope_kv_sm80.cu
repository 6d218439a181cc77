// RoPE over f16 or bf16 rows of q, k and v, with k and v written to the FP16 cache. A warp takes a head of a row: eight pairs a lane,
// read and written in 16-byte pieces, turned in f32.
#include "cuda/half.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kHeads = 4;  // of a row, a block's

template <class T>
__global__ void __launch_bounds__(kHeads * 32)
rope_kv_kernel(const __grid_constant__ RopeKV op) {
  ptx::dependency_release();
  ptx::dependency_wait();
  const int i = blockIdx.x, head = blockIdx.y * kHeads + threadIdx.x / 32, d = int(op.head_dim), half = d / 2;
  if (head >= op.heads + 2 * op.kv_heads) return;
  const int kv_head = max(head - int(op.heads), 0) % int(op.kv_heads);
  const bool is_q = head < op.heads, is_v = head >= op.heads + op.kv_heads;
  T* from = reinterpret_cast<T*>(op.qkv) + i * op.qkv_stride + int64_t(head) * d;
  void* cache = is_v ? op.cache.v : op.cache.k;
  __half* to = static_cast<__half*>(cache) + op.slot[i] * op.cache.slot_stride + kv_head * op.cache.head_stride + int64_t(op.position[i]) * d;
  for (int c = threadIdx.x % 32 * 8; c < half; c += 32 * 8) {
    float a[8], b[8];
    load8(from + c, a);
    load8(from + half + c, b);
    if (!is_v) {
      const size_t angle = size_t(op.position[i]) * half + c;
      float cos[8], sin[8];
      load8(op.cos + angle, cos);
      load8(op.sin + angle, sin);
      for (int j = 0; j < 8; ++j) {
        const float first = a[j] * cos[j] - b[j] * sin[j];
        b[j] = b[j] * cos[j] + a[j] * sin[j], a[j] = first;
      }
    }
    if (is_q)
      store8(from + c, a), store8(from + half + c, b);
    else
      store8(to + c, a), store8(to + half + c, b);
  }
}

const char* refuses(const RopeKV& op) {
  if (op.cache.bits != 16) return "writes a cache of 16 bits";
  if (op.q_transform) return "changes no basis after the rotation";
  if (op.head_dim % 16) return "head_dim is no multiple of 16";
  if (op.qkv_stride % 8 || op.cache.slot_stride % 8 || op.cache.head_stride % 8) return "a stride is no multiple of 8";
  for (const void* p : {static_cast<const void*>(op.qkv), static_cast<const void*>(op.cos), static_cast<const void*>(op.sin),
                        static_cast<const void*>(op.cache.k), static_cast<const void*>(op.cache.v)})
    if (!aligned16(p)) return "a pointer is not 16-byte aligned";
  return nullptr;
}

void run(const RopeKV& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    const dim3 grid(unsigned(op.m), unsigned((op.heads + 2 * op.kv_heads + kHeads - 1) / kHeads));
    launch(rope_kv_kernel<T>, grid, dim3(kHeads * 32), 0, stream, op);
  });
}

const Row<RopeKV> row{{"rope_kv_sm80", Device::cuda, Arch::sm80, 2, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
