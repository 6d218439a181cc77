// Eight neighbouring elements of a key or a value as they lie in a cache of 16, 8 or 4 bits, and as operands of f16 tensor cores: whole numbers,
// code or code − zero, are exact there and wait for their scale.
#pragma once

#include "cuda/half.cuh"
#include "cuda/ptx.cuh"

namespace pe {

template <int bits>
struct Eight {
  uint32_t word[bits / 4];

  // From element `at` on of keys or values; zeros if there is none.
  __device__ __forceinline__ Eight(const void* base, int64_t at, bool there) {
    for (uint32_t& w : word) w = 0;
    if (!there) return;
    const char* from = static_cast<const char*>(base) + at * bits / 8;
    if constexpr (bits == 16) {
      const uint4 v = *reinterpret_cast<const uint4*>(from);
      word[0] = v.x, word[1] = v.y, word[2] = v.z, word[3] = v.w;
    } else if constexpr (bits == 8) {
      const uint2 v = *reinterpret_cast<const uint2*>(from);
      word[0] = v.x ^ 0x80808080u, word[1] = v.y ^ 0x80808080u;
    } else {
      word[0] = *reinterpret_cast<const uint32_t*>(from);
    }
  }

  // Two of them, in f16: elements first(p) and second(p). zero: f16 1024 + the zero code, twice.
  static __device__ constexpr int first(int p) { return bits == 4 ? p : 2 * p; }
  static __device__ constexpr int second(int p) { return bits == 4 ? p + 4 : 2 * p + 1; }
  __device__ __forceinline__ uint32_t pair(int p, __half2 zero) const {
    if constexpr (bits == 16) return word[p];
    if constexpr (bits == 8) return minus(__byte_perm(word[p / 2], 0x64646464u, p % 2 ? 0x4342 : 0x4140), zero);
    if constexpr (bits == 4) return minus(ptx::and_or(word[0] >> (4 * p), 0x000f000fu, 0x64006400u), zero);
  }

  // Element j of a and of b. zero: f16 1024 + their zero codes.
  static __device__ __forceinline__ uint32_t both(const Eight& a, const Eight& b, int j, __half2 zero) {
    if constexpr (bits == 16) return __byte_perm(a.word[j / 2], b.word[j / 2], j % 2 ? 0x7632 : 0x5410);
    const int byte = bits == 8 ? j % 4 : j / 2;
    const uint32_t two = __byte_perm(a.word[bits == 8 ? j / 4 : 0], b.word[bits == 8 ? j / 4 : 0], byte | (4 + byte) << 8);
    if constexpr (bits == 8) return minus(ptx::and_or(two, 0x00ff00ffu, 0x64006400u), zero);
    return minus(ptx::and_or(two >> (j % 2 * 4), 0x000f000fu, 0x64006400u), zero);
  }

  // What pair() and both() take for the zero codes of two elements. Codes of 8 bits are moved up by 128 on their way.
  static __device__ __forceinline__ __half2 zeros(const uint8_t* zero, int64_t a, int64_t b) {
    if constexpr (bits == 4) return __floats2half2_rn(1024.0f + zero[a], 1024.0f + zero[b]);
    return __float2half2_rn(1024 + 128);
  }

 private:
  static __device__ __forceinline__ uint32_t minus(uint32_t v, __half2 zero) { return bits_of(__hsub2(pair_of<__half2>(v), zero)); }
};

}  // namespace pe
