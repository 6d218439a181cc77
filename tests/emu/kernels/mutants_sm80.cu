// Kernels with bugs that need no Hopper: a reduction, an exchange within a warp, producer and consumer warps, a GEMM tile with a ring of
// cp.async stages, and a sum over blocks. Their bugs are listed in test_mutants.py.
#include "mutants.cuh"

namespace {

// out[block] = Σ x[block, n]; 128 threads.
template <int Bug>
__global__ void __launch_bounds__(128) block_sum(const float* x, float* out, int n) {
  __shared__ float part[4];
  float sum = 0;
  for (int i = threadIdx.x; Bug == 1 ? i <= n : i < n; i += 128) sum += x[blockIdx.x * size_t(n) + i];
  for (int step = 16; step > (Bug == 2 ? 1 : 0); step /= 2) sum += __shfl_xor_sync(Bug == 3 ? 0xffffu : 0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32 + (Bug == 4)] = sum;
  if (Bug == 5) {
    if (threadIdx.x < 96) __syncthreads();
  } else if (Bug != 6) {
    __syncthreads();
  }
  if (threadIdx.x == 0) out[blockIdx.x] = part[0] + part[1] + part[2] + part[3];
  if (Bug == 7 && threadIdx.x == 0) const_cast<float*>(x)[blockIdx.x * size_t(n)] = 0;
}

// Each warp reverses 32 numbers twice through shared memory.
template <int Bug>
__global__ void __launch_bounds__(64) reverse_twice(const float* x, float* y) {
  __shared__ float s[2][32];
  float* mine = s[threadIdx.x / 32];
  const int lane = threadIdx.x % 32, at = blockIdx.x * 64 + threadIdx.x;
  mine[lane] = x[at];
  if (Bug != 1) __syncwarp();
  const float v = mine[31 - lane];
  if (Bug != 2) __syncwarp(Bug == 3 ? (lane < 16 ? 0xffffu : 0xffff0000u) : 0xffffffffu);
  mine[lane] = v + 1;
  __syncwarp();
  y[at] = mine[31 - lane];
}

// Warps 0 and 1 write pieces, warps 2 and 3 add them up; named barrier 1: full, 2: empty.
template <int Bug>
__global__ void __launch_bounds__(128) producer_consumer(const float* x, float* y, int pieces) {
  __shared__ float s[64];
  const int i = threadIdx.x % 64;
  float sum = 0;
  for (int p = 0; p < pieces; ++p) {
    if (threadIdx.x < 64) {
      if (p && Bug != 1) asm volatile("bar.sync 2, 128;" ::: "memory");
      s[i] = x[p * 64 + i];
      if (Bug == 2)
        asm volatile("bar.arrive 1, 96;" ::: "memory");
      else
        asm volatile("bar.arrive 1, 128;" ::: "memory");
    } else {
      if (Bug != 3) asm volatile("bar.sync 1, 128;" ::: "memory");
      sum += s[63 - i];
      if (p + 1 < pieces && Bug != 4) asm volatile("bar.arrive 2, 128;" ::: "memory");
    }
  }
  if (threadIdx.x >= 64) y[i] = sum;
}

// d[m, 64] = a[m, k]·b[64, k]ᵀ in tiles of 16 rows, 4 warps of 16 columns; stages of k = 32, two of them, rows padded by 16 bytes.
constexpr int kStep = 32, kRow = kStep + 8, kStageHalves = (16 + 64) * kRow;
constexpr int kTileBytes = 2 * kStageHalves * 2;

template <int Bug>
__device__ void load_stage(__half* stage, const __half* a, const __half* b, int m, int k, int at) {
  for (int i = threadIdx.x; i < 80 * 4; i += 128) {
    const int row = i / 4, col = i % 4 * 8, r = blockIdx.x * 16 + row;
    const bool inside = row >= 16 || r < m || Bug == 4;
    const __half* from = row < 16 ? a + size_t(inside ? r : 0) * k : b + size_t(row - 16) * k;
    copy_16(stage + row * kRow + col, from + at + col + (Bug == 10 && at ? 8 : 0),
            Bug == 11 && row < 16 && r >= m - 1 ? 8
            : inside                            ? 16
                                                : 0);
  }
  commit();
}

template <int Bug>
__global__ void __launch_bounds__(128) gemm_tile(const __half* a, const __half* b, float* d, int m, int k) {
  extern __shared__ __align__(16) __half stages[];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, steps = k / kStep;
  float sum[2][4] = {};
  load_stage<Bug>(stages, a, b, m, k, 0);
  for (int s = 0; s < steps; ++s) {
    if (s + 1 < steps) load_stage<Bug>(stages + (s + 1) % 2 * kStageHalves, a, b, m, k, (s + 1) * kStep);
    if (s + 1 < steps || Bug == 3)
      wait<1>();
    else
      wait<0>();
    if (Bug != 1) __syncthreads();
    const __half* stage = stages + s % 2 * kStageHalves;
    for (int c = 0; c < kStep; c += 16) {
      uint32_t fa[4], fb[4];
      ldmatrix_4(fa, stage + (lane % 16) * kRow + c + lane / 16 * 8 + (Bug == 7 && lane == 5 ? 8 : 0));
      ldmatrix_4<Bug == 8>(fb, stage + (16 + warp * 16 + lane % 8 + lane / 16 * 8) * kRow + c + lane / 8 % 2 * 8);
      mma<Bug == 6>(sum[0], fa, fb[0], fb[1]);
      mma<Bug == 6>(sum[1], fa, fb[Bug == 12 ? 3 : 2], fb[Bug == 12 ? 2 : 3]);
    }
    if (Bug != 2) __syncthreads();
  }
  for (int t = 0; t < 2; ++t)
    for (int i = 0; i < 4; ++i) {
      const int row = blockIdx.x * 16 + lane / 4 + i / 2 * 8, col = warp * 16 + t * 8 + lane % 4 * 2 + i % 2;
      if (row < m || Bug == 5) d[size_t(row) * 64 + col] = sum[t][i];
    }
}

// y[64] = Σ over blocks of x[block, 64]: the block that comes last adds up what all have written.
template <int Bug>
__global__ void __launch_bounds__(64) sum_over_blocks(const float* x, float* part, unsigned* counter, float* y) {
  __shared__ bool last;
  part[blockIdx.x * 64 + threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x] * 2;
  if (Bug == 2)
    __threadfence_block();
  else if (Bug != 1)
    __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(counter, 1) == gridDim.x - (Bug == 4 ? 2 : 1);
  if (Bug != 5) __syncthreads();
  if (!last) return;
  if (Bug != 3) __threadfence();
  float sum = 0;
  for (int b = 0; b < int(gridDim.x); ++b) sum += part[b * 64 + threadIdx.x];
  y[threadIdx.x] = sum;
}

// Block b waits for the flag of block b - 1, adds its own and goes on: works only if blocks run beside each other.
template <int Bug>
__global__ void __launch_bounds__(32) chain(const float* x, float* y, volatile unsigned* flag) {
  if (threadIdx.x == 0) {
    while (*flag != blockIdx.x + (Bug == 1)) {
    }
    __threadfence();
    y[0] = blockIdx.x ? y[0] + x[blockIdx.x] : x[0];
    if (Bug != 2) __threadfence();
    *flag = blockIdx.x + 1;
  }
}

}  // namespace

MUTANT_EXPORT int run_block_sum(int bug, const float* x, float* out, int blocks, int n, cudaStream_t stream) {
  with_bug<8>(bug, [&](auto b) { block_sum<b.value><<<blocks, 128, 0, stream>>>(x, out, n); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_reverse_twice(int bug, const float* x, float* y, int blocks, int, cudaStream_t stream) {
  with_bug<4>(bug, [&](auto b) { reverse_twice<b.value><<<blocks, 64, 0, stream>>>(x, y); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_producer_consumer(int bug, const float* x, float* y, int, int pieces, cudaStream_t stream) {
  with_bug<5>(bug, [&](auto b) { producer_consumer<b.value><<<1, 128, 0, stream>>>(x, y, pieces); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_gemm_tile(int bug, const __half* a, const __half* b, float* d, int m, int k, cudaStream_t stream) {
  const int bytes = kTileBytes - (bug == 9 ? 64 : 0), blocks = bug == 13 ? m / 16 : bug == 14 ? 0 : (m + 15) / 16;
  with_bug<13>(bug >= 13 ? 0 : bug, [&](auto v) {
    gemm_tile<v.value><<<blocks, bug == 15 ? 256 : 128, bug == 16 ? 60000 : bytes, bug == 17 ? nullptr : stream>>>(a, b, d, m, k);
  });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_sum_over_blocks(int bug, const float* x, float* part, unsigned* counter, float* y, int blocks, cudaStream_t stream) {
  with_bug<6>(bug, [&](auto b) { sum_over_blocks<b.value><<<blocks, 64, 0, stream>>>(x, part, counter, y); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_chain(int bug, const float* x, float* y, unsigned* flag, int blocks, cudaStream_t stream) {
  with_bug<3>(bug, [&](auto b) { chain<b.value><<<blocks, 32, 0, stream>>>(x, y, flag); });
  return cudaGetLastError();
}
