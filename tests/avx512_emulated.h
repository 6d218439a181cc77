// Included ahead of the AVX-512 and AMX kernels by PYENGINE_EMULATE_AVX512: their instructions on a machine with AVX2, through SIMDe and,
// where Debian's SIMDe 0.7 lacks them, by what follows. Results have the bits of the hardware, but for two things: which payload a NaN
// has, and the order in which a vector is summed by reduce_add (which is the compiler's choice, here GCC's).
#pragma once

// A vector as a template argument loses its alignment, which only its copies here would need.
#pragma GCC diagnostic ignored "-Wignored-attributes"

#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/f16c.h>
#include <simde/x86/fma.h>

#include <cstdint>
#include <cstring>

namespace emulated {

// ---- vectors, by halves of AVX2 or lane by lane

template <class Half>
struct Halves {
  Half at[2];
};

template <class To, class From>
To copy_bits(const From& from) {
  static_assert(sizeof(To) == sizeof from);
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

template <class T, class Vector>
struct Lanes {
  T at[sizeof(Vector) / sizeof(T)];
  Lanes() = default;
  explicit Lanes(Vector v) { std::memcpy(at, &v, sizeof at); }
  Vector vector() const { return copy_bits<Vector>(at); }
};

using Floats = Lanes<float, simde__m512>;

// f of both halves of v. To is what they make together.
template <class To, class Half, class From, class F>
To by_halves(From v, F f) {
  const auto half = copy_bits<Halves<Half>>(v);
  using Result = decltype(f(half.at[0]));
  return copy_bits<To>(Halves<Result>{{f(half.at[0]), f(half.at[1])}});
}

inline simde__m512 maskz_loadu(simde__mmask16 mask, const float* p) {
  Floats out;
  for (int i = 0; i < 16; ++i) out.at[i] = mask >> i & 1 ? p[i] : 0.0f;
  return out.vector();
}
inline void mask_storeu(float* p, simde__mmask16 mask, simde__m512 v) {
  const Floats from(v);
  for (int i = 0; i < 16; ++i)
    if (mask >> i & 1) p[i] = from.at[i];
}

template <class F>
float reduce(simde__m512 v, F f) {
  Floats t(v);
  for (int width = 8; width; width /= 2)
    for (int i = 0; i < width; ++i) t.at[i] = f(t.at[i], t.at[i + width]);
  return t.at[0];
}
inline float reduce_add(simde__m512 v) {
  return reduce(v, [](float a, float b) { return a + b; });
}
inline float reduce_max(simde__m512 v) {
  return reduce(v, [](float a, float b) { return a > b ? a : b; });
}

inline simde__m512 cvtph(__m256i v) {
  return by_halves<simde__m512, __m128i>(v, [](__m128i h) { return _mm256_cvtph_ps(h); });
}
inline __m256i cvtps_ph(simde__m512 v) {
  return by_halves<__m256i, __m256>(v, [](__m256 h) { return _mm256_cvtps_ph(h, 0); });
}
inline simde__m512i cvtps_epi32(simde__m512 v) {
  return by_halves<simde__m512i, __m256>(v, [](__m256 h) { return _mm256_cvtps_epi32(h); });
}
inline simde__m512 cvtepi32_ps(simde__m512i v) {
  return by_halves<simde__m512, __m256i>(v, [](__m256i h) { return _mm256_cvtepi32_ps(h); });
}
inline simde__m512i cvtepu16_epi32(__m256i v) {
  return by_halves<simde__m512i, __m128i>(v, [](__m128i h) { return _mm256_cvtepu16_epi32(h); });
}
inline simde__m512i cvtepu8_epi16(__m256i v) {
  return copy_bits<simde__m512i>(Halves<__m256i>{{_mm256_cvtepu8_epi16(_mm256_castsi256_si128(v)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(v, 1))}});
}
inline simde__m512i cvtepi8_epi32(__m128i v) {
  return copy_bits<simde__m512i>(Halves<__m256i>{{_mm256_cvtepi8_epi32(v), _mm256_cvtepi8_epi32(_mm_srli_si128(v, 8))}});
}
inline simde__m512i cvtepu8_epi32(__m128i v) {
  return copy_bits<simde__m512i>(Halves<__m256i>{{_mm256_cvtepu8_epi32(v), _mm256_cvtepu8_epi32(_mm_srli_si128(v, 8))}});
}
inline __m128i cvtepi32_epi8(simde__m512i v) {
  const Lanes<uint32_t, simde__m512i> from(v);
  Lanes<uint8_t, __m128i> out;
  for (int i = 0; i < 16; ++i) out.at[i] = uint8_t(from.at[i]);
  return out.vector();
}
inline simde__m512i srai(simde__m512i v, unsigned count) {
  return by_halves<simde__m512i, __m256i>(v, [&](__m256i h) { return _mm256_srai_epi32(h, int(count)); });
}

// SIMDe has these two, but several times slower.
inline simde__m512 permutexvar_ps(simde__m512i at, simde__m512 table) {
  const auto half = copy_bits<Halves<__m256>>(table);
  return by_halves<simde__m512, __m256i>(at, [&](__m256i h) {
    const __m256 low = _mm256_permutevar8x32_ps(half.at[0], h), high = _mm256_permutevar8x32_ps(half.at[1], h);
    return _mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(h, 28)));
  });
}
inline simde__m512i dpbusd(simde__m512i sum, simde__m512i a, simde__m512i b) {
  const auto total = copy_bits<Halves<__m256i>>(sum), u = copy_bits<Halves<__m256i>>(a), s = copy_bits<Halves<__m256i>>(b);
  Halves<__m256i> out;
  for (int i = 0; i < 2; ++i) {
    const __m256i low = _mm256_srai_epi16(_mm256_slli_epi16(s.at[i], 8), 8), high = _mm256_srai_epi16(s.at[i], 8);
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(u.at[i], _mm256_set1_epi16(255)), low);
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(u.at[i], 8), high);
    out.at[i] = _mm256_add_epi32(total.at[i], _mm256_add_epi32(even, odd));
  }
  return copy_bits<simde__m512i>(out);
}

template <int scale>
simde__m512 gather(simde__m512i at, const float* p) {
  return by_halves<simde__m512, __m256i>(at, [&](__m256i h) { return _mm256_i32gather_ps(p, h, scale); });
}

// Quarters 0 and 1 of the result are a's, 2 and 3 are b's; two bits of `which` name each.
inline simde__m512 shuffle_f32x4(simde__m512 a, simde__m512 b, int which) {
  const Lanes<__m128, simde__m512> from[2] = {Lanes<__m128, simde__m512>(a), Lanes<__m128, simde__m512>(b)};
  Lanes<__m128, simde__m512> out;
  for (int i = 0; i < 4; ++i) out.at[i] = from[i / 2].at[which >> 2 * i & 3];
  return out.vector();
}

// ---- bf16 and tiles

// VCVTNE2PS2BF16: to nearest even, denormals are zero, NaN becomes quiet. Lanes of `first`, then of `second`.
inline uint16_t bf16(float f) {
  const uint32_t bits = copy_bits<uint32_t>(f), magnitude = bits & 0x7fffffff;
  if (magnitude < 0x00800000) return uint16_t(bits >> 16 & 0x8000);
  if (magnitude > 0x7f800000) return uint16_t(bits >> 16 | 0x40);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline simde__m512i round_bf16(simde__m512 first, simde__m512 second) {
  const Floats from[2] = {Floats(first), Floats(second)};
  Lanes<uint16_t, simde__m512i> out;
  for (int i = 0; i < 32; ++i) out.at[i] = bf16(from[i / 16].at[i % 16]);
  return out.vector();
}

// A tile of 16 rows of 64 bytes.
struct alignas(64) Tile {
  uint32_t word[16][16];

  void load(const void* p, int64_t stride) {
    for (int64_t r = 0; r < 16; ++r) std::memcpy(word[r], static_cast<const char*>(p) + r * stride, sizeof word[r]);
  }
  void store(void* p, int64_t stride) const {
    for (int64_t r = 0; r < 16; ++r) std::memcpy(static_cast<char*>(p) + r * stride, word[r], sizeof word[r]);
  }

  // TDPBF16PS: even and odd inputs are summed apart, each product fused with its sum, then together, then added to the tile.
  // Whatever MXCSR says, the hardware rounds to nearest even and takes denormals, before and after, for zeros.
  void add_product(const Tile& left, const Tile& right) {
    constexpr unsigned kDenormalsAreZero = 0x0040, kFlushToZero = 0x8000, kAllMasked = 0x1f80;
    const unsigned before = _mm_getcsr();
    _mm_setcsr(kAllMasked | kDenormalsAreZero | kFlushToZero);
    sum_products(left, right);
    _mm_setcsr(before);
  }

  // TDPBSSD: sums of four products of signed bytes, modulo 2^32.
  void add_int8_product(const Tile& left, const Tile& right) {
    for (int r = 0; r < 16; ++r)
      for (int p = 0; p < 16; ++p) {
        const Lanes<int8_t, uint32_t> a(left.word[r][p]);
        for (int c = 0; c < 16; ++c) {
          const Lanes<int8_t, uint32_t> b(right.word[p][c]);
          for (int i = 0; i < 4; ++i) word[r][c] += uint32_t(int32_t(a.at[i]) * b.at[i]);
        }
      }
  }

 private:
  static float even(uint32_t pair) { return copy_bits<float>(pair << 16); }
  static float odd(uint32_t pair) { return copy_bits<float>(pair & 0xffff0000); }

  // Not inlined: the compiler may move arithmetic past a change of MXCSR, but not a call that writes memory.
  [[gnu::noinline]] void sum_products(const Tile& left, const Tile& right) {
    for (int r = 0; r < 16; ++r) {
      float sum[2][16] = {};
      for (int p = 0; p < 16; ++p)
        for (int c = 0; c < 16; ++c) {
          sum[0][c] = __builtin_fmaf(even(left.word[r][p]), even(right.word[p][c]), sum[0][c]);
          sum[1][c] = __builtin_fmaf(odd(left.word[r][p]), odd(right.word[p][c]), sum[1][c]);
        }
      for (int c = 0; c < 16; ++c) word[r][c] = copy_bits<uint32_t>(copy_bits<float>(word[r][c]) + (sum[0][c] + sum[1][c]));
    }
  }
};

// The eight tiles of a thread. Outside of begin() and end() the hardware has none, and any use ends the process.
struct Tiles {
  void begin() { *this = {}, configured_ = true; }
  void end() { configured_ = false; }
  Tile& operator[](int i) {
    if (!configured_) __builtin_trap();
    return at_[i];
  }

 private:
  bool configured_ = false;
  Tile at_[8] = {};
};
inline thread_local Tiles tile;

}  // namespace emulated

#define _mm512_maskz_loadu_ps emulated::maskz_loadu
#define _mm512_mask_storeu_ps emulated::mask_storeu
#define _mm512_reduce_add_ps emulated::reduce_add
#define _mm512_reduce_max_ps emulated::reduce_max
#define _mm512_cvtph_ps emulated::cvtph
#define _mm512_cvtps_ph(v, rounding) emulated::cvtps_ph(v)
#define _mm512_cvtps_epi32 emulated::cvtps_epi32
#define _mm512_cvtepi32_ps emulated::cvtepi32_ps
#define _mm512_cvtepu16_epi32 emulated::cvtepu16_epi32
#define _mm512_cvtepu8_epi16 emulated::cvtepu8_epi16
#define _mm512_cvtepi8_epi32 emulated::cvtepi8_epi32
#define _mm512_cvtepu8_epi32 emulated::cvtepu8_epi32
#define _mm512_cvtepi32_epi8 emulated::cvtepi32_epi8
#define _mm512_srai_epi32 emulated::srai
#undef _mm512_permutexvar_ps
#undef _mm512_dpbusd_epi32
#define _mm512_permutexvar_ps emulated::permutexvar_ps
#define _mm512_dpbusd_epi32 emulated::dpbusd
#define _mm512_i32gather_ps(at, p, scale) emulated::gather<scale>(at, p)
#define _mm512_shuffle_f32x4 emulated::shuffle_f32x4
