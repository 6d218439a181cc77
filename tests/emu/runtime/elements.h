// Numbers as matrix instructions hold them, and their conversions.
#pragma once

#include <immintrin.h>

#include <bit>
#include <cmath>

#include "machine.h"

namespace emu {

inline float bits_float(u32 v) { return std::bit_cast<float>(v); }
inline u32 float_bits(float v) { return std::bit_cast<u32>(v); }
inline float from_f16(u16 v) { return _cvtsh_ss(v); }
inline float from_bf16(u16 v) { return bits_float(u32(v) << 16); }

// To float with the last bit set if anything was cut off: rounding that to fewer bits equals rounding the double once.
inline float to_odd(double v) {
  const float f = float(v);
  if (double(f) == v || std::isnan(v) || std::isinf(f)) return f;
  u32 bits = float_bits(f);
  if (std::fabs(double(f)) > std::fabs(v)) --bits;
  return bits_float(bits | 1);
}
inline u16 to_f16(double v) { return _cvtss_sh(to_odd(v), _MM_FROUND_TO_NEAREST_INT); }
inline u16 to_bf16(double v) {
  const u32 bits = float_bits(to_odd(v));
  if ((bits & 0x7fffffff) > 0x7f800000) return 0x7fff;
  return u16((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

constexpr int element_bits(Element e) {
  return e == Element::f16 || e == Element::bf16 ? 16 : e == Element::s8 || e == Element::u8 ? 8 : 4;
}

// The i-th element of a register.
inline float element(Element e, u32 reg, int i) {
  switch (e) {
    case Element::f16:
      return from_f16(u16(reg >> 16 * i));
    case Element::bf16:
      return from_bf16(u16(reg >> 16 * i));
    case Element::s8:
      return float(s8(reg >> 8 * i));
    case Element::u8:
      return float(u8(reg >> 8 * i));
    case Element::s4:
      return float(s32(reg << (28 - 4 * i)) >> 28);
    default:
      return float(reg >> 4 * i & 15);
  }
}

// All of them.
inline void elements(Element e, u32 reg, float* to) {
  if (e == Element::f16) {
    to[0] = from_f16(u16(reg)), to[1] = from_f16(u16(reg >> 16));
    return;
  }
  for (int i = 0; i < 32 / element_bits(e); ++i) to[i] = element(e, reg, i);
}

}  // namespace emu
