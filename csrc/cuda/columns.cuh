// Whole inputs kept in FP16 (ops.h, columns) on the f16 or bf16 tensor cores, sixteen of them a step: y += column_value · x at those inputs. Products
// are exact, sums f32: of an FP16 value, which has 11 bits, bf16 takes two parts.
#pragma once

#include <type_traits>

#include "cuda/layout_mma.cuh"
#include "cuda/ptx.cuh"

namespace pe {

constexpr int kColumnStep = 16;
constexpr int kColumnRow = kColumnStep + 8;  // a token's x of a step in shared memory: 8 rows' 16-byte pieces lie in different banks

// Part p of two FP16 values in the activations' type: f16 has one; of bf16, with its 8 bits, two together hold all 11.
template <class T>
constexpr int kParts = std::is_same_v<T, __half> ? 1 : 2;
template <class T>
__device__ uint32_t value_part(uint32_t two_halves, int p) {
  if constexpr (kParts<T> == 1) return two_halves;
  const float2 value = __half22float2(pair_of<__half2>(two_halves));
  const __nv_bfloat162 high = __float22bfloat162_rn(value);
  const float2 rest = __bfloat1622float2(high);
  return bits_of(p == 0 ? high : __float22bfloat162_rn({value.x - rest.x, value.y - rest.y}));
}

// The row operand of m16n8k16 for the 16 outputs from `output` on and a step's columns from `column` on: zeros where there are none.
template <class T>
__device__ void column_values(const QLinear& op, int64_t output, int64_t column, uint32_t (&a)[kParts<T>][4]) {
  const int lane = threadIdx.x % 32;
  for (int i = 0; i < 4; ++i) {
    const int64_t row = output + lane / 4 + i % 2 * 8, at = column + i / 2 * 8 + lane % 4 * 2;
    uint32_t two = 0;
    for (int j = 0; j < 2; ++j)
      if (row < op.n && at + j < op.columns) two |= uint32_t(op.column_value[row * op.columns + at + j]) << (16 * j);
    for (int p = 0; p < kParts<T>; ++p) a[p][i] = value_part<T>(two, p);
  }
}

// Bytes of shared memory that add_columns() needs for so many tokens: of y, in rows of `row_size` f32, and behind it of x.
constexpr size_t out_bytes(int tokens, int row_size) { return size_t(tokens) * (row_size * 4 + kColumnRow * 2); }

// Adds the columns to a block's tile of y in shared memory, f32[tokens][row_size] with kGemmOutputs outputs, by all its threads, which have
// just written there. A warp takes 16 outputs.
template <class T>
__device__ void add_columns(const QLinear& op, float* out, int row_size, int64_t token0, int tokens, int64_t output0) {
  T* x = reinterpret_cast<T*>(out + tokens * row_size);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t first = 0; first < op.columns; first += kColumnStep) {
    for (int i = threadIdx.x; i < tokens * kColumnStep; i += blockDim.x) {
      const int64_t token = token0 + i / kColumnStep, column = first + i % kColumnStep;
      const bool there = token < op.m && column < op.columns;
      x[i / kColumnStep * kColumnRow + i % kColumnStep] =
          there ? reinterpret_cast<const T*>(op.x)[token * op.x_stride + op.column_index[column]] : T(0.0f);
    }
    __syncthreads();  // x is there, and at first y
    for (int band = warp; band < mma::kGemmOutputs / mma::kBand; band += blockDim.x / 32) {
      uint32_t a[kParts<T>][4];
      column_values<T>(op, output0 + band * mma::kBand, first, a);
      for (int token = 0; token < tokens; token += 16) {
        uint32_t b[4];
        ptx::load_matrices(b, ptx::shared(x + (token + lane / 16 * 8 + lane % 8) * kColumnRow + lane / 8 % 2 * 8));
        for (int half = 0; half < 2; ++half) {
          float sum[4] = {};
          for (int p = 0; p < kParts<T>; ++p) ptx::mma(T(), sum, a[p], b[2 * half], b[2 * half + 1]);
          float* at = out + (token + half * 8 + lane % 4 * 2) * row_size + band * mma::kBand + lane / 4;
          for (int i = 0; i < 4; ++i) at[i % 2 * row_size + i / 2 * 8] += sum[i];
        }
      }
    }
    __syncthreads();  // the next step's x comes where this one's was
  }
}

// What is left to do when a block's threads have just written their sums into its tile of y: the columns, then as store_tile() says.
template <class T>
__device__ void finish_tile(const QLinear& op, float* out, int row_size, int64_t token0, int tokens, int64_t output0) {
  if (op.columns)
    add_columns<T>(op, out, row_size, token0, tokens, output0);
  else
    __syncthreads();
  store_tile<T>(op, out, row_size, token0, tokens, output0, mma::kGemmOutputs);
}

}  // namespace pe
