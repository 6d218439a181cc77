// Codes of layout mma (ops.h) → the operand of m16n8k16 with a warp's 16 outputs as rows: the integers code − zero, exact in f16 and bf16.
//
// A code is put into the mantissa of a power of two whose last place counts ones, one instruction for two codes, and what is too much
// taken away again in one more: 1024 in f16 (0x6400), 128 in bf16 (0x4300), 2^23 in f32 (0x4b000000).
#pragma once

#include <type_traits>

#include "cuda/half.cuh"
#include "cuda/ptx.cuh"

namespace pe {

// One for each 16 outputs and group. zeros: the zero codes of the lane's outputs g and g+8 in the lowest two bytes.
// words: the bits/4 words of a step.
template <class T, int bits>
struct Dequant;

template <>
struct Dequant<__half, 4> {
  __half2 row0, row8;

  __device__ __forceinline__ Dequant(uint32_t zeros) {
    row0 = pair_of<__half2>(__byte_perm(zeros, 0x64646464u, 0x4040));
    row8 = __hsub2(__float2half2_rn(960), pair_of<__half2>(__byte_perm(zeros, 0x64646464u, 0x4141)));
  }

  __device__ __forceinline__ void operator()(const uint32_t* words, uint32_t (&a)[4]) const {
    for (int i = 0; i < 2; ++i) {
      const uint32_t word = words[0] >> (8 * i);
      a[2 * i] = bits_of(__hsub2(pair_of<__half2>(ptx::and_or(word, 0x000f000fu, 0x64006400u)), row0));
      // These bits stand 4 places up, so they count sixteens: (1024 + 16 · code) / 16 + (960 − 1024 − zero) = code − zero.
      a[2 * i + 1] = bits_of(__hfma2(pair_of<__half2>(ptx::and_or(word, 0x00f000f0u, 0x64006400u)), __float2half2_rn(0.0625f), row8));
    }
  }
};

template <>
struct Dequant<__nv_bfloat16, 4> {  // its mantissa has no room for a code 4 places up; exact for zeros up to 127
  __nv_bfloat162 row0, row8;

  __device__ __forceinline__ Dequant(uint32_t zeros) {
    row0 = pair_of<__nv_bfloat162>(__byte_perm(zeros, 0x43434343u, 0x4040));
    row8 = pair_of<__nv_bfloat162>(__byte_perm(zeros, 0x43434343u, 0x4141));
  }

  __device__ __forceinline__ void operator()(const uint32_t* words, uint32_t (&a)[4]) const {
    for (int i = 0; i < 4; ++i)
      a[i] = bits_of(__hsub2(pair_of<__nv_bfloat162>(ptx::and_or(words[0] >> (4 * i), 0x000f000fu, 0x43004300u)), i % 2 ? row8 : row0));
  }
};

template <>
struct Dequant<__half, 8> {
  __half2 row0, row8;

  __device__ __forceinline__ Dequant(uint32_t zeros) {
    row0 = pair_of<__half2>(__byte_perm(zeros, 0x64646464u, 0x4040));
    row8 = pair_of<__half2>(__byte_perm(zeros, 0x64646464u, 0x4141));
  }

  __device__ __forceinline__ void operator()(const uint32_t* words, uint32_t (&a)[4]) const {
    for (int i = 0; i < 4; ++i)
      a[i] = bits_of(__hsub2(pair_of<__half2>(__byte_perm(words[i / 2], 0x64646464u, i % 2 ? 0x4342 : 0x4140)), i % 2 ? row8 : row0));
  }
};

template <>
struct Dequant<__nv_bfloat16, 8> {  // a code needs 8 bits of mantissa, bf16 has 7: by way of f32, whose upper half is the result
  float row0, row8;

  static __device__ __forceinline__ float number(uint32_t bytes, int which) {
    return __uint_as_float(__byte_perm(bytes, 0x4b000000u, 0x7440 + which));
  }
  __device__ __forceinline__ Dequant(uint32_t zeros) { row0 = number(zeros, 0), row8 = number(zeros, 1); }

  __device__ __forceinline__ void operator()(const uint32_t* words, uint32_t (&a)[4]) const {
    for (int i = 0; i < 4; ++i) {
      const float row = i % 2 ? row8 : row0;
      const float first = number(words[i / 2], i % 2 * 2) - row, second = number(words[i / 2], i % 2 * 2 + 1) - row;
      a[i] = __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
    }
  }
};

// Two integers of an operand times the scale of their row, rounded to T. By an f16 scale f16 is multiplied in one instruction, with the
// same result: an integer and a scale together have no more digits than f32.
__device__ __forceinline__ uint32_t times(uint32_t pair, __half scale) { return bits_of(__hmul2(pair_of<__half2>(pair), __half2half2(scale))); }
template <class T>
__device__ __forceinline__ uint32_t times(uint32_t pair, float scale) {
  const float2 v = unpack(pair_of<typename Pair<T>::Type>(pair));
  return bits_of(Pair<T>::from({v.x * scale, v.y * scale}));
}

// An outlier's FP16 value as T.
template <class T>
__device__ __forceinline__ T outlier_value(uint32_t entry) {
  const __half value = __ushort_as_half(uint16_t(entry >> 16));
  if constexpr (std::is_same_v<T, __half>) return value;
  else return __float2bfloat16_rn(__half2float(value));
}

}  // namespace pe
