// What the kernels over layout mma have in common.
#pragma once

#include "cuda/half.cuh"
#include "ops.h"
#include "pack_mma.h"

namespace pe {

// Why none of them takes this problem.
inline const char* refuses_mma(const QLinear& op) {
  if (op.gated) return "gates no result: silu_mul does";
  if (op.act_bits != 16) return "takes activations of 16 bits";
  if (op.bits != 4 && op.bits != 8) return "takes codes of 4 or 8 bits";
  if (op.group != 32 && op.group != 64 && op.group != 128 && op.group != op.k) return "takes groups of 32, 64, 128 or a whole row";
  if (!aligned16(op.x) || op.x_stride % 8) return "rows of x are not 16-byte aligned";
  return nullptr;
}

// input >> group_shift is the input's group.
inline int group_shift(const QLinear& op) { return op.group == op.k ? 31 : op.group == 32 ? 5 : op.group == 64 ? 6 : 7; }

// How the blocks share the work: each takes `per_block` of the `tiles` of 64 inputs. Where several have the same outputs, `counter`
// counts for each tile of y those that are done, and `sums` has room for what each has found.
struct Shares {
  int tiles, per_block, groups, group_shift;
  uint32_t* counter;
  float4* sums;
};

inline Shares shares_of(const QLinear& op, const mma::Split& split) {
  char* sums = static_cast<char*>(op.workspace) + mma::kCounterBytes;
  return {int(mma::blocks_of(op.k, mma::kTile)), split.per_block, int(op.k / op.group), group_shift(op),
          static_cast<uint32_t*>(op.workspace), reinterpret_cast<float4*>(sums)};
}

// After each of `blocks` blocks has stored its sums: true in all threads of the last block to come here, which sees the sums of all and
// has set the counter back to 0.
__device__ __forceinline__ bool last_to_come(uint32_t* counter, unsigned blocks) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicInc(counter, blocks - 1) == blocks - 1;
  __syncthreads();
  if (last) __threadfence();
  return last;
}

__device__ __forceinline__ void add_to(float4& sum, float4 v) { sum.x += v.x, sum.y += v.y, sum.z += v.z, sum.w += v.w; }

// y = f32 sums (+ bias) (+ residual) for a tile of tokens × outputs in shared memory, by all threads of a block: 16 bytes of a row a
// thread where rows of y and of the residual allow that, else value by value.
template <class T>
__device__ void store_tile(const QLinear& op, const float* sums, int row_size, int64_t token0, int tokens, int64_t output0, int outputs) {
  const T* residual = reinterpret_cast<const T*>(op.residual);
  T* y = reinterpret_cast<T*>(op.y);
  const bool wide = op.y_stride % 8 == 0 && reinterpret_cast<uintptr_t>(y) % 16 == 0 && reinterpret_cast<uintptr_t>(residual) % 16 == 0;
  for (int i = threadIdx.x; i < tokens * outputs / 8; i += blockDim.x) {
    const int row = i / (outputs / 8), column = i % (outputs / 8) * 8;
    const int64_t token = token0 + row, output = output0 + column;
    if (token >= op.m) return;
    const size_t at = token * op.y_stride + output;
    float v[8];
    for (int j = 0; j < 8; ++j) v[j] = sums[row * row_size + column + j] + (op.bias && output + j < op.n ? op.bias[output + j] : 0.0f);
    if (wide && output + 8 <= op.n) {
      float before[8] = {};
      if (residual) load8(residual + at, before);
      for (int j = 0; j < 8; ++j) v[j] += before[j];
      store8(y + at, v);
    } else {
      for (int j = 0; j < 8; ++j)
        if (output + j < op.n) y[at + j] = T(residual ? v[j] + float(residual[at + j]) : v[j]);
    }
  }
}

}  // namespace pe
