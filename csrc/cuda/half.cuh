// Activations in f16 and bf16: eight of them in one 16-byte access, as f32 and back.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "ops.h"

namespace pe {

// Calls f with a null pointer of the activations' type: f(static_cast<const T*>(nullptr)).
template <class F>
void with_type(Dtype dtype, F&& f) {
  dtype == Dtype::f16 ? f(static_cast<const __half*>(nullptr)) : f(static_cast<const __nv_bfloat16*>(nullptr));
}

inline bool aligned16(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

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

// Eight neighbouring values, 16-byte aligned in memory.
template <class T>
struct alignas(16) Eight {
  typename Pair<T>::Type pair[4];

  __device__ __forceinline__ void get(float (&v)[8]) const {
    for (int i = 0; i < 4; ++i) {
      const float2 two = unpack(pair[i]);
      v[2 * i] = two.x, v[2 * i + 1] = two.y;
    }
  }
  __device__ __forceinline__ void set(const float (&v)[8]) {
    for (int i = 0; i < 4; ++i) pair[i] = Pair<T>::from({v[2 * i], v[2 * i + 1]});
  }
};

}  // namespace pe
