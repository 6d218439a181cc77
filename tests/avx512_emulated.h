// Included ahead of csrc/cpu/rows.cpp by PYENGINE_EMULATE_AVX512: the AVX-512 intrinsics in plain C through SIMDe, so that the AVX-512
// kernels are tested on machines without it. What follows the includes is what Debian's SIMDe 0.7 lacks.
#pragma once

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstdint>
#include <cstring>

namespace emulated {

template <class T>
struct Lanes {
  T at[16];
};

template <class T, class Vector>
Lanes<T> lanes(Vector v) {
  Lanes<T> out;
  static_assert(sizeof out == sizeof v);
  std::memcpy(&out, &v, sizeof v);
  return out;
}

// A vector of Vector's type whose lane i is f(i).
template <class Vector, class T, class F>
Vector make(F f) {
  Lanes<T> out;
  for (int i = 0; i < 16; ++i) out.at[i] = T(f(i));
  Vector v;
  static_assert(sizeof out == sizeof v);
  std::memcpy(&v, &out, sizeof v);
  return v;
}

template <class F>
float reduce(simde__m512 v, F f) {
  auto t = lanes<float>(v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) t.at[i] = f(t.at[i], t.at[i + width]);
  return t.at[0];
}

inline simde__m512 maskz_loadu(simde__mmask16 mask, const float* p) {
  return make<simde__m512, float>([&](int i) { return mask >> i & 1 ? p[i] : 0.0f; });
}
inline void mask_storeu(float* p, simde__mmask16 mask, simde__m512 v) {
  const auto t = lanes<float>(v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) p[i] = t.at[i];
}
inline float reduce_add(simde__m512 v) {
  return reduce(v, [](float a, float b) { return a + b; });
}
inline float reduce_max(simde__m512 v) {
  return reduce(v, [](float a, float b) { return a > b ? a : b; });
}
inline simde__m512 cvtph(simde__m256i v) {
  const auto t = lanes<uint16_t>(v);
  return make<simde__m512, float>([&](int i) { return _cvtsh_ss(t.at[i]); });
}
inline simde__m256i cvtps_ph(simde__m512 v) {
  const auto t = lanes<float>(v);
  return make<simde__m256i, uint16_t>([&](int i) { return _cvtss_sh(t.at[i], 0); });
}
inline simde__m512i cvtps_epi32(simde__m512 v) {
  const auto t = lanes<float>(v);
  return make<simde__m512i, int32_t>([&](int i) { return std::nearbyint(t.at[i]); });
}
inline simde__m512i cvtepu8_epi32(simde__m128i v) {
  const auto t = lanes<uint8_t>(v);
  return make<simde__m512i, int32_t>([&](int i) { return t.at[i]; });
}
inline simde__m128i cvtepi32_epi8(simde__m512i v) {
  const auto t = lanes<int32_t>(v);
  return make<simde__m128i, uint8_t>([&](int i) { return t.at[i]; });
}
inline simde__m512 cvtepi32_ps(simde__m512i v) {
  const auto t = lanes<int32_t>(v);
  return make<simde__m512, float>([&](int i) { return t.at[i]; });
}

inline simde__m512i srai(simde__m512i v, unsigned count) {
  const auto t = lanes<int32_t>(v);
  return make<simde__m512i, int32_t>([&](int i) { return t.at[i] >> count; });
}

}  // namespace emulated

#define _mm512_maskz_loadu_ps emulated::maskz_loadu
#define _mm512_mask_storeu_ps emulated::mask_storeu
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_cvtph_ps emulated::cvtph
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_srai_epi32 emulated::srai
