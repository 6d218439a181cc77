// Arithmetic of PTX, one function an instruction: of integers modulo 2^n, of f32 and f64 as the host has them, of f16 and bf16 in double
// with one rounding. All are templates over the types of instructions. The generated code lives inside this namespace, so that `sin` or
// `div` there is the one below and never that of <math.h>.
#pragma once

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "elements.h"

namespace emu::ops {

using f32 = float;
using f64 = double;
struct f16 {
  u16 bits;
};
struct bf16 {
  u16 bits;
};
template <class H>
struct Pair {
  H lo, hi;
};
using f16x2 = Pair<f16>;
using bf16x2 = Pair<bf16>;
using b8 = u8;
using b16 = u16;
using b32 = u32;
using b64 = u64;
__extension__ typedef unsigned __int128 b128;
__extension__ typedef __int128 s128;

template <class T>
constexpr bool is_half = std::is_same_v<T, f16> || std::is_same_v<T, bf16>;
template <class T>
constexpr bool is_pair = std::is_same_v<T, f16x2> || std::is_same_v<T, bf16x2>;

inline double value(f16 v) { return from_f16(v.bits); }
inline double value(bf16 v) { return from_bf16(v.bits); }
inline double value(double v) { return v; }
inline float value(float v) { return v; }
template <class T>
T make(double v) {
  if constexpr (std::is_same_v<T, f16>) {
    return {to_f16(v)};
  } else if constexpr (std::is_same_v<T, bf16>) {
    return {to_bf16(v)};
  } else {
    return T(v);
  }
}

// A register read as an instruction's type, and an instruction's result written to a register, extended by its sign if it has one.
template <class T, class R>
T get(R reg) {
  if constexpr (std::is_integral_v<T> || std::is_same_v<T, b128>) {
    return T(reg);
  } else {
    static_assert(sizeof(T) <= sizeof(R));
    T v;
    memcpy(&v, &reg, sizeof v);
    return v;
  }
}
template <class R, class T>
void put(R& reg, T v) {
  if constexpr (std::is_integral_v<T> || std::is_same_v<T, b128> || std::is_same_v<T, s128>) {
    reg = R(v);
  } else {
    reg = 0;
    static_assert(sizeof(T) <= sizeof(R));
    memcpy(&reg, &v, sizeof v);
  }
}
template <class T>
T bits(u64 v) {
  return get<T>(v);
}

// f on each half of a pair, on integers modulo 2^n, on the number itself otherwise.
template <class T, class F, class... More>
T each(F f, T a, More... more) {
  if constexpr (is_pair<T>) {
    return {each(f, a.lo, more.lo...), each(f, a.hi, more.hi...)};
  } else if constexpr (std::is_integral_v<T>) {
    using U = std::conditional_t<(sizeof(T) < 4), u32, std::make_unsigned_t<T>>;
    return T(f(U(a), U(more)...));
  } else {
    return make<T>(f(value(a), value(more)...));
  }
}
template <class T>
T add(T a, T b) {
  return each([](auto x, auto y) { return x + y; }, a, b);
}
template <class T>
T sub(T a, T b) {
  return each([](auto x, auto y) { return x - y; }, a, b);
}
template <class T>
T mul(T a, T b) {
  return each([](auto x, auto y) { return x * y; }, a, b);
}
template <class T>
T fma(T a, T b, T c) {
  return each([](auto x, auto y, auto z) { return std::fma(x, y, z); }, a, b, c);
}
template <class T>
T neg(T a) {
  if constexpr (is_pair<T>)
    return {neg(a.lo), neg(a.hi)};
  else if constexpr (is_half<T>)
    return {u16(a.bits ^ 0x8000)};
  else if constexpr (std::is_integral_v<T>)
    return sub(T(0), a);
  else
    return -a;
}
template <class T>
T abs(T a) {
  if constexpr (is_pair<T>)
    return {abs(a.lo), abs(a.hi)};
  else if constexpr (is_half<T>)
    return {u16(a.bits & 0x7fff)};
  else if constexpr (std::is_integral_v<T>)
    return a < 0 ? neg(a) : a;
  else
    return std::fabs(a);
}
template <class T>
T relu(T a) {
  if constexpr (is_pair<T>)
    return {relu(a.lo), relu(a.hi)};
  else
    return value(a) > 0 || std::isnan(value(a)) ? a : make<T>(0);
}
template <class T>
T min(T a, T b) {
  if constexpr (is_pair<T>)
    return {min(a.lo, b.lo), min(a.hi, b.hi)};
  else if constexpr (std::is_integral_v<T>)
    return std::min(a, b);
  else if (value(a) == 0 && value(b) == 0)
    return std::signbit(value(a)) ? a : b;
  else
    return std::isnan(value(a)) ? b : std::isnan(value(b)) || value(a) < value(b) ? a : b;
}
template <class T>
T max(T a, T b) {
  if constexpr (is_pair<T>)
    return {max(a.lo, b.lo), max(a.hi, b.hi)};
  else if constexpr (std::is_integral_v<T>)
    return std::max(a, b);
  else if (value(a) == 0 && value(b) == 0)
    return std::signbit(value(a)) ? b : a;
  else
    return std::isnan(value(a)) ? b : std::isnan(value(b)) || value(a) > value(b) ? a : b;
}
template <class T>
T nan_or(T a, T b, T result) {
  if constexpr (is_pair<T>)
    return {nan_or(a.lo, b.lo, result.lo), nan_or(a.hi, b.hi, result.hi)};
  else
    return std::isnan(value(a)) || std::isnan(value(b)) ? make<T>(NAN) : result;
}
template <class T>
T min_nan(T a, T b) {
  return nan_or(a, b, min(a, b));
}
template <class T>
T max_nan(T a, T b) {
  return nan_or(a, b, max(a, b));
}
inline f32 ftz(f32 v) { return std::fabs(v) < std::numeric_limits<f32>::min() ? std::copysign(0.0f, v) : v; }
inline f32 saturate(f32 v) { return v > 0 ? std::min(v, 1.0f) : 0.0f; }
inline f32 copysign(f32 sign, f32 v) { return std::copysign(v, sign); }

template <class T>
T div(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return b == 0 ? T(-1) : std::is_signed_v<T> && b == T(-1) ? neg(a) : T(a / b);
  else
    return a / b;
}
template <class T>
T rem(T a, T b) {
  return b == 0 ? a : std::is_signed_v<T> && b == T(-1) ? T(0) : T(a % b);
}
template <class T>
T rcp(T a) {
  return 1 / a;
}
template <class T>
T sqrt(T a) {
  return std::sqrt(a);
}
inline f32 rsqrt(f32 a) { return f32(1 / std::sqrt(f64(a))); }
template <class T>
T ex2(T a) {
  return each([](auto x) { return std::exp2(x); }, a);
}
inline f32 lg2(f32 a) { return std::log2(a); }
inline f32 sin(f32 a) { return std::sin(a); }
inline f32 cos(f32 a) { return std::cos(a); }
template <class T>
T tanh(T a) {
  return each([](auto x) { return std::tanh(x); }, a);
}

// ---- integers --------------------------------------------------------------------------------------------------------------------
template <class T>
struct WideOf {
  using U = std::conditional_t<sizeof(T) == 2, u32, std::conditional_t<sizeof(T) == 4, u64, b128>>;
  using S = std::conditional_t<sizeof(T) == 2, s32, std::conditional_t<sizeof(T) == 4, s64, s128>>;
  using Type = std::conditional_t<std::is_signed_v<T>, S, U>;
};
template <class T>
using Wide = typename WideOf<T>::Type;
template <class T>
Wide<T> mul_wide(T a, T b) {
  return Wide<T>(a) * Wide<T>(b);
}
template <class T>
T mul_hi(T a, T b) {
  return T(mul_wide(a, b) >> 8 * sizeof(T));
}
template <class T>
T mad_lo(T a, T b, T c) {
  return add(mul(a, b), c);
}
template <class T>
T mad_hi(T a, T b, T c) {
  return add(mul_hi(a, b), c);
}
template <class T>
Wide<T> mad_wide(T a, T b, Wide<T> c) {
  return add(mul_wide(a, b), c);
}
inline s32 add_sat(s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) + b, INT32_MIN, INT32_MAX)); }
inline s32 sub_sat(s32 a, s32 b) { return s32(std::clamp<s64>(s64(a) - b, INT32_MIN, INT32_MAX)); }
template <class T>
T bit_and(T a, T b) {
  return a & b;
}
template <class T>
T bit_or(T a, T b) {
  return a | b;
}
template <class T>
T bit_xor(T a, T b) {
  return a ^ b;
}
template <class T>
T bit_not(T a) {
  if constexpr (std::is_same_v<T, bool>)
    return !a;
  else
    return T(~a);
}
template <class T>
T shl(T a, u32 b) {
  return b >= 8 * sizeof(T) ? T(0) : T(a << b);
}
template <class T>
T shr(T a, u32 b) {
  return b >= 8 * sizeof(T) ? (a < T(0) ? T(-1) : T(0)) : T(a >> b);
}
inline u32 shf_l(u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) << c >> 32); }
inline u32 shf_r(u32 a, u32 b, u32 c) { return u32((u64(b) << 32 | a) >> c); }
inline u32 shf_l_wrap(u32 a, u32 b, u32 c) { return shf_l(a, b, c & 31); }
inline u32 shf_r_wrap(u32 a, u32 b, u32 c) { return shf_r(a, b, c & 31); }
inline u32 shf_l_clamp(u32 a, u32 b, u32 c) { return c >= 32 ? a : shf_l(a, b, c); }
inline u32 shf_r_clamp(u32 a, u32 b, u32 c) { return c >= 32 ? b : shf_r(a, b, c); }
inline u32 lop3(u32 a, u32 b, u32 c, u32 table) {
  u32 r = 0;
  for (u32 i = 0; i < 8; ++i)
    if (table >> i & 1) r |= (i & 4 ? a : ~a) & (i & 2 ? b : ~b) & (i & 1 ? c : ~c);
  return r;
}
inline u32 prmt(u32 a, u32 b, u32 c) {
  u32 r = 0;
  for (int i = 0; i < 4; ++i) {
    const u32 pick = c >> 4 * i & 15;
    const u8 byte = u8((u64(b) << 32 | a) >> 8 * (pick & 7));
    r |= u32(pick & 8 ? (byte & 0x80 ? 0xff : 0) : byte) << 8 * i;
  }
  return r;
}
template <class T>
T bfe(T a, u32 position, u32 length) {
  constexpr u32 n = 8 * sizeof(T);
  position &= 255, length &= 255;
  if (!length) return 0;
  const u32 top = std::min(position + length - 1, n - 1);
  const bool sign = std::is_signed_v<T> && a >> top & 1;
  T r = sign ? T(-1) : T(0);
  for (u32 i = 0; i < std::min(length, n); ++i) {
    const bool bit = position + i < n ? a >> (position + i) & 1 : sign;
    r = T(bit ? r | T(1) << i : r & ~(T(1) << i));
  }
  return r;
}
template <class T>
T bfi(T a, T b, u32 position, u32 length) {
  constexpr u32 n = 8 * sizeof(T);
  position &= 255, length &= 255;
  for (u32 i = 0; i < length && position + i < n; ++i) {
    const T bit = T(1) << (position + i);
    b = i < n && a >> i & 1 ? b | bit : b & ~bit;
  }
  return b;
}
template <class T>
u32 popc(T a) {
  return u32(std::popcount(a));
}
template <class T>
u32 clz(T a) {
  return u32(std::countl_zero(a));
}
template <class T>
T brev(T a) {
  T r = 0;
  for (u32 i = 0; i < 8 * sizeof(T); ++i) r = T(r << 1 | (a >> i & 1));
  return r;
}
template <class T>
u32 bfind(T a) {
  using U = std::make_unsigned_t<T>;
  const U v = U(a < T(0) ? ~a : a);
  return v ? u32(8 * sizeof(T) - 1) - u32(std::countl_zero(v)) : ~0u;
}
template <class A, class B>
u32 dp4a(u32 a, u32 b, u32 c) {
  for (int i = 0; i < 4; ++i)
    c += u32(s32(std::conditional_t<std::is_signed_v<A>, s8, u8>(a >> 8 * i)) *
             s32(std::conditional_t<std::is_signed_v<B>, s8, u8>(b >> 8 * i)));
  return c;
}

// ---- conversions -----------------------------------------------------------------------------------------------------------------
template <class D, class S>
D convert(S v) {
  return D(v);
}  // between integers: cut off or extended
template <class D, class S>
D convert_sat(S v) {
  const s128 x = s128(v);
  return D(std::clamp<s128>(x, std::numeric_limits<D>::min(), std::numeric_limits<D>::max()));
}
// From an integer: through f64 where that is exact, else at once. A 64-bit integer is never converted to f16 or bf16 here.
template <class D, class S>
D from_int(S v) {
  if constexpr (std::is_same_v<D, f32> || std::is_same_v<D, f64>)
    return D(v);
  else
    return make<D>(f64(v));
}
enum class Round { near, zero, down, up };
template <Round r>
f64 whole(f64 v) {
  return r == Round::near ? std::nearbyint(v) : r == Round::zero ? std::trunc(v) : r == Round::down ? std::floor(v) : std::ceil(v);
}
template <class D, Round r, class S>
D to_int(S v) {  // saturates, and NaN is 0 (for 64 bits: 2^63)
  const f64 x = whole<r>(f64(value(v)));
  if (std::isnan(x)) return sizeof(D) == 8 ? D(u64(1) << 63) : D(0);
  if (x <= f64(std::numeric_limits<D>::min())) return std::numeric_limits<D>::min();
  return x >= f64(std::numeric_limits<D>::max()) ? std::numeric_limits<D>::max() : D(x);
}
template <class D, class S>
D to_float(S v) {
  return make<D>(f64(value(v)));
}
template <class D, Round r, class S>
D to_whole(S v) {
  return make<D>(whole<r>(f64(value(v))));
}
inline f16 to_f16_zero(f32 v) { return {u16(_cvtss_sh(v, _MM_FROUND_TO_ZERO))}; }
template <class H>
Pair<H> pack(f32 hi, f32 lo) {
  return {make<H>(lo), make<H>(hi)};
}

// ---- comparisons -----------------------------------------------------------------------------------------------------------------
template <class T>
bool unordered(T a, T b) {
  if constexpr (std::is_integral_v<T>)
    return false;
  else
    return std::isnan(value(a)) || std::isnan(value(b));
}
#define EMU_COMPARE(name, op)                          \
  template <class T>                                   \
  bool name(T a, T b) {                                \
    if constexpr (std::is_integral_v<T>)               \
      return a op b;                                   \
    else                                               \
      return !unordered(a, b) && value(a) op value(b); \
  }                                                    \
  template <class T>                                   \
  bool name##u(T a, T b) {                             \
    return unordered(a, b) || name(a, b);              \
  }
EMU_COMPARE(eq, ==)
EMU_COMPARE(ne, !=)
EMU_COMPARE(lt, <)
EMU_COMPARE(le, <=)
EMU_COMPARE(gt, >)
EMU_COMPARE(ge, >=)
#undef EMU_COMPARE
template <class T>
bool num(T a, T b) {
  return !unordered(a, b);
}
template <class T>
bool nan(T a, T b) {
  return unordered(a, b);
}

}  // namespace emu::ops
