// Activations in f16 and bf16: eight of them in one 16-byte access, as f32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/ptx.cuh"
#include "ops.h"

namespace pe {

// Calls f with a null pointer of the activations' type: f(static_cast<const T*>(nullptr)).
template <class F>
void with_type(Dtype dtype, F&& f) {
  dtype == Dtype::f16 ? f(static_cast<const __half*>(nullptr)) : f(static_cast<const __nv_bfloat16*>(nullptr));
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

__device__ __forceinline__ uint32_t bits_of(__half2 v) { return *reinterpret_cast<const uint32_t*>(&v); }
__device__ __forceinline__ uint32_t bits_of(__nv_bfloat162 v) { return *reinterpret_cast<const uint32_t*>(&v); }
template <class Two>
__device__ __forceinline__ Two pair_of(uint32_t bits) {
  return *reinterpret_cast<const Two*>(&bits);
}

__device__ __forceinline__ float2 unpack(__half2 v) { return __half22float2(v); }
__device__ __forceinline__ float2 unpack(__nv_bfloat162 v) { return __bfloat1622float2(v); }

template <class T>
struct Pair;
template <>
struct Pair<__half> {
  using Type = __half2;
  static __device__ __forceinline__ Type from(float2 v) { return __float22half2_rn(v); }
};
template <>
struct Pair<__nv_bfloat16> {
  using Type = __nv_bfloat162;
  static __device__ __forceinline__ Type from(float2 v) { return __float22bfloat162_rn(v); }
};

// Eight neighbouring values, 16-byte aligned in memory, in one access: copied as a struct of pairs the compiler takes four.
template <class T>
__device__ __forceinline__ void load8(const T* from, float (&v)[8]) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  const uint32_t word[4] = {bits.x, bits.y, bits.z, bits.w};
  for (int i = 0; i < 4; ++i) {
    const float2 two = unpack(pair_of<typename Pair<T>::Type>(word[i]));
    v[2 * i] = two.x, v[2 * i + 1] = two.y;
  }
}

__device__ __forceinline__ void load8(const float* from, float (&v)[8]) {
  for (int i = 0; i < 2; ++i) {
    const float4 four = reinterpret_cast<const float4*>(from)[i];
    v[4 * i] = four.x, v[4 * i + 1] = four.y, v[4 * i + 2] = four.z, v[4 * i + 3] = four.w;
  }
}

// Stores them rounded to T, which is also what v holds then.
template <class T>
__device__ __forceinline__ void store8(T* to, float (&v)[8]) {
  uint32_t word[4];
  for (int i = 0; i < 4; ++i) {
    const auto two = Pair<T>::from({v[2 * i], v[2 * i + 1]});
    word[i] = bits_of(two);
    v[2 * i] = unpack(two).x, v[2 * i + 1] = unpack(two).y;
  }
  ptx::store16(to, make_uint4(word[0], word[1], word[2], word[3]));
}

}  // namespace pe
