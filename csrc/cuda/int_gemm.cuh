// What the kernels have in common that multiply integers: activations' codes, which Transform makes, with codes of layout mma, summed exactly
// in s32: over a whole row, or over a group, whose sum is then scaled and added to those of the other groups in f32.
//
// A lane of layout mma holds 8 neighbouring inputs of a half of a tile, which is what the INT4 operand wants. The INT8 operand wants 4 inputs
// from 4t and 4 from 16+4t on, in the order in which activations' codes lie in memory: those are words of the lanes t/2 and 2+t/2 of the
// same row, so a lane reads these two pieces instead of its own, as many bytes from shared memory as before since neighbours share them.
#pragma once

#include "cuda/layout_mma.cuh"
#include "cuda/columns.cuh"
#include "cuda/make_weights.cuh"
#include "dispatch.h"

namespace pe {

// Why none of them takes this problem. Sums of K products of codes times 16 (int8_rows) stay within 16 · 8 · 128 · K < 2^31.
inline const char* refuses_int(const QLinear& op) {
  if (op.act_bits != 8 && op.act_bits != 4) return "takes activations of 8 or 4 bits";
  if (op.bits != 4 && op.bits != 8) return "takes codes of 4 or 8 bits";
  if (op.act_bits == 4 && op.bits == 8) return "takes activations of 4 bits with weights of 4 bits alone";
  if (op.gated) return "gates no result: silu_mul does";
  if (op.group != 64 && op.group != 128 && op.group != op.k) return "takes groups of 64, 128 or a whole row";
  if (op.zero) return "takes symmetric weights";
  if (op.outlier_row || op.outlier_entry) return "multiplies no single FP16 outliers by integers, but whole columns";
  if (op.k % (128 / op.act_bits)) return op.act_bits == 8 ? "k is no multiple of 16" : "k is no multiple of 32";
  if (op.k >= 131072) return "k is 131072 or more, too many products for a sum of 32 bits";
  if (!op.x_code != !op.x_scale) return "takes x_code and x_scale together";
  if (op.m > 0 && op.columns && !op.x) return "takes x for the columns";
  if (!op.x_code && (!aligned16(op.x) || op.x_stride % 8)) return "rows of x are not 16-byte aligned";
  if (!aligned16(op.x_code)) return "x_code is not 16-byte aligned";
  return nullptr;
}

// The op with the codes that came with it, or those that Transform makes of x, in the workspace.
inline QLinear with_codes(QLinear op, void* stream) {
  if (op.x_code) return op;
  const mma::CodesPlace place = mma::codes_place(op);
  char* workspace = static_cast<char*>(op.workspace);
  Transform quantizer = quantizer_of(op);
  quantizer.code = workspace + place.code, quantizer.scale = reinterpret_cast<float*>(workspace + place.scale);
  pe::run(quantizer, stream);
  op.x_code = quantizer.code, op.x_scale = quantizer.scale;
  return op;
}

// What the codes of int8_rows() are multiplied by, for codes of 4 bits.
constexpr int kTimes = 16;

// The row operands of m16n8k32 for a tile's two halves: 16 · (code − 8) of 4 bits, whose nibble need not be moved down nor its sign spread,
// or code − 128 of 8 bits. band: the band's pieces in shared memory.
template <int bits>
__device__ __forceinline__ void int8_rows(const uint4* band, int lane, uint32_t (&a)[2][4]) {
  const int near = lane - lane % 4 + lane % 4 / 2;
  for (int u = 0; u < 2; ++u) {
    if constexpr (bits == 4) {
      const uint4 piece = band[near + 2 * u];
      const uint32_t own = lane % 2 ? 0x7564 : 0x3120;  // the word of the lane's inputs, 0 2 1 3 → 0 1 2 3
      const uint32_t word[2] = {__byte_perm(piece.x, piece.y, own), __byte_perm(piece.z, piece.w, own)};
      for (int half = 0; half < 2; ++half) {
        a[half][2 * u] = ptx::and_xor(word[half] << 4, 0xf0f0f0f0u, 0x80808080u);
        a[half][2 * u + 1] = ptx::and_xor(word[half], 0xf0f0f0f0u, 0x80808080u);
      }
    } else {
      for (int half = 0; half < 2; ++half) {
        const uint2 word = reinterpret_cast<const uint2*>(band + half * 32 + near + 2 * u)[lane % 2];
        a[half][2 * u] = __byte_perm(word.x, word.y, 0x5410) ^ 0x80808080u;
        a[half][2 * u + 1] = __byte_perm(word.x, word.y, 0x7632) ^ 0x80808080u;
      }
    }
  }
}

// The row operand of m16n8k64 for a tile: code − 8.
__device__ __forceinline__ void int4_rows(const uint4* band, int lane, uint32_t (&a)[4]) {
  const uint4 piece = band[lane];
  const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
  for (int half = 0; half < 2; ++half) {
    // Inputs 0 2 4 6 and 1 3 5 7, each with row g in the low nibble and row g+8 in the high one.
    const uint32_t even = __byte_perm(word[2 * half], word[2 * half + 1], 0x5410) ^ 0x88888888u;
    const uint32_t odd = __byte_perm(word[2 * half], word[2 * half + 1], 0x7632) ^ 0x88888888u;
    a[2 * half] = (even & 0x0f0f0f0fu) | (odd << 4 & 0xf0f0f0f0u);
    a[2 * half + 1] = (even >> 4 & 0x0f0f0f0fu) | (odd & 0xf0f0f0f0u);
  }
}

// The scale of an output in the padded rows of layout mma, 0 beyond them.
__device__ __forceinline__ float row_scale(const QLinear& op, int64_t r) {
  if (r / mma::kTile > (op.n - 1) / mma::kTile) return 0;
  const size_t at = size_t(r / mma::kTile) * mma::kTile + r % 8 * 8 + r % mma::kTile / mma::kBand * 2 + r % mma::kBand / 8;
  return op.scale_f32 ? static_cast<const float*>(op.scale)[at] : __half2float(static_cast<const __half*>(op.scale)[at]);
}

// The scales of outputs g and g+8 of one of a block's eight bands in the group of a tile of inputs.
__device__ __forceinline__ float2 group_scales(const QLinear& op, const Shares& shares, int band, int tile) {
  const int group = min(tile * mma::kTile >> shares.group_shift, shares.groups - 1);
  const size_t at = (size_t(row_tile(op, band)) * shares.groups + group) * mma::kTile + threadIdx.x % 32 / 4 * 8 + band % 4 * 2;
  if (op.scale_f32) return *reinterpret_cast<const float2*>(static_cast<const float*>(op.scale) + at);
  return __half22float2(*reinterpret_cast<const __half2*>(static_cast<const __half*>(op.scale) + at));
}

// Whether a group ends with a tile of inputs.
__device__ __forceinline__ bool ends_group(const Shares& shares, int tile) { return shares.group_shift == 6 || tile % 2; }

// Adds a band's sums of a group, times their scales, to those of all groups.
template <int N>
__device__ __forceinline__ void add_group(int* sum, float* total, float2 scale) {
#pragma unroll
  for (int i = 0; i < N; ++i) total[i] += float(sum[i]) * (i % 4 / 2 ? scale.y : scale.x), sum[i] = 0;
}

// Adds what the other blocks of this tile of y have found; false in all of them but the last to come. The first `threads` threads of a
// block have sums, s32 or with groups f32; all of them come here.
template <class Sum, int N>
__device__ bool add_other_sums(const Shares& shares, int threads, Sum (&sum)[N]) {
  using Four = std::conditional_t<std::is_same_v<Sum, int>, int4, float4>;
  const unsigned tile = blockIdx.y * gridDim.x + blockIdx.x;
  const bool mine = int(threadIdx.x) < threads;
  auto place = [&](int block, int i) {
    return reinterpret_cast<Four*>(shares.sums) + ((size_t(tile) * gridDim.z + block) * (N / 4) + i) * threads + threadIdx.x;
  };
  if (mine)
    for (int i = 0; i < N / 4; ++i) *place(blockIdx.z, i) = {sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]};
  if (!last_to_come(shares.counter + tile, gridDim.z)) return false;
  if (!mine) return true;
#pragma unroll 1
  for (int block = 0; block < int(gridDim.z); ++block)
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      const Four other = __ldcg(place(block, i));
      Sum* v = sum + 4 * i;
      if (block == 0) v[0] = v[1] = v[2] = v[3] = 0;
      v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
    }
  return true;
}

constexpr int kIntRow = mma::kGemmOutputs + 4;  // f32 of a row of y on its way out: rows 2t and columns g of a warp lie in different banks

// What mma gives a lane for 16 outputs × 8 tokens, to the block's tile of y[tokens][outputs] in shared memory, as it is. `token` and `output`
// are those of the lane's first sum within the tile.
__device__ __forceinline__ float as_it_is(int sum) { return __int_as_float(sum); }
__device__ __forceinline__ float as_it_is(float sum) { return sum; }
template <class Sum>
__device__ __forceinline__ void put_sums(const Sum* sum, float* out, int token, int output) {
  for (int i = 0; i < 4; ++i) out[(token + i % 2) * kIntRow + output + i / 2 * 8] = as_it_is(sum[i]);
}

// y of the block's tile, by all its threads, a multiple of its outputs: sums times their scales, and the columns, then as store_tile() says.
// times: what the codes have been multiplied by. grouped: sums are f32 and have the scales of their outputs already.
template <bool grouped>
__device__ __forceinline__ void store_sums(const QLinear& op, float* out, int tokens, int times) {
  const int64_t token0 = int64_t(blockIdx.y) * tokens, output0 = int64_t(blockIdx.x) * mma::kGemmOutputs;
  const int output = threadIdx.x % mma::kGemmOutputs;
  const float row = (grouped ? 1.0f : row_scale(op, output0 + output)) / float(times);
#pragma unroll 4
  for (int token = threadIdx.x / mma::kGemmOutputs; token < tokens; token += blockDim.x / mma::kGemmOutputs) {
    const int at = token * kIntRow + output;
    const float sum = grouped ? out[at] : float(__float_as_int(out[at]));
    out[at] = sum * (row * (token0 + token < op.m ? op.x_scale[token0 + token] : 0.0f));
  }
  if (op.dtype == Dtype::f16)
    finish_tile<__half>(op, out, kIntRow, token0, tokens, output0);
  else
    finish_tile<__nv_bfloat16>(op, out, kIntRow, token0, tokens, output0);
}

}  // namespace pe
