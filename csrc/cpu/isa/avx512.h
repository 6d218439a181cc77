// Sixteen lanes of AVX-512 with VNNI: the vocabulary that the kernels of csrc/cpu are written in.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dispatch.h"

namespace pe {

struct Avx512 {
  static constexpr int lanes = 16;
  static constexpr Arch arch = Arch::avx512;
  static constexpr Layout layout = Layout::tile16;
  // Tokens that a matrix kernel takes at once, beside two tiles: 16 sums, two codes and an activation out of 32 registers.
  static constexpr int tokens = 8;
  static constexpr int planes = 2;  // of a 16-bit activation (qlinear.h)

  using F = __m512;
  using I = __m512i;

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static __mmask16 first(int count) { return __mmask16((1u << count) - 1); }
  static F load(const float* p, int count) { return _mm512_maskz_loadu_ps(first(count), p); }
  static void store(float* p, F v, int count) { _mm512_mask_storeu_ps(p, first(count), v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }
  static F abs(F a) { return _mm512_abs_ps(a); }
  // Lane j of v[i] and lane i of v[j] change places.
  static void transpose(F (&v)[16]) {
    F t[16];
    for (int i = 0; i < 16; i += 2) t[i] = _mm512_unpacklo_ps(v[i], v[i + 1]), t[i + 1] = _mm512_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 16; i += 4)
      for (int j = 0; j < 2; ++j) {
        const __m512d a = _mm512_castps_pd(t[i + j]), b = _mm512_castps_pd(t[i + j + 2]);
        v[i + 2 * j] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), v[i + 2 * j + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
      }
    // v[4a + c] holds column 4q + c of rows 4a … 4a + 3 in its quarter q.
    for (int c = 0; c < 4; ++c) {
      const F even = _mm512_shuffle_f32x4(v[c], v[4 + c], 0x88), odd = _mm512_shuffle_f32x4(v[c], v[4 + c], 0xdd);
      const F even2 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0x88), odd2 = _mm512_shuffle_f32x4(v[8 + c], v[12 + c], 0xdd);
      t[c] = _mm512_shuffle_f32x4(even, even2, 0x88), t[8 + c] = _mm512_shuffle_f32x4(even, even2, 0xdd);
      t[4 + c] = _mm512_shuffle_f32x4(odd, odd2, 0x88), t[12 + c] = _mm512_shuffle_f32x4(odd, odd2, 0xdd);
    }
    for (int i = 0; i < 16; ++i) v[i] = t[i];
  }

  // By halves: lane i and i + 8, then i + 4, …
  static float sum(F v) { return _mm512_reduce_add_ps(v); }
  // Lane i is the sum of v[i]'s lanes: four rounds that each halve the number of vectors.
  static F sum_each(const F (&v)[16]) {
    F two[8], four[4], eight[2];
    for (int i = 0; i < 8; ++i) two[i] = add(_mm512_unpacklo_ps(v[2 * i], v[2 * i + 1]), _mm512_unpackhi_ps(v[2 * i], v[2 * i + 1]));
    for (int i = 0; i < 4; ++i) {
      const __m512d a = _mm512_castps_pd(two[2 * i]), b = _mm512_castps_pd(two[2 * i + 1]);
      four[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)));
    }
    // Quarter q of four[i] holds what v[4i] … v[4i+3] have in theirs.
    for (int i = 0; i < 2; ++i) eight[i] = add_quarters(four[2 * i], four[2 * i + 1]);
    return add_quarters(eight[0], eight[1]);
  }
  static float largest(F v) { return _mm512_reduce_max_ps(v); }
  // a where limit ≥ value, else b.
  static F where_reaches(F limit, F value, F a, F b) { return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(limit, value, _CMP_GE_OQ), b, a); }

  // Whether a factor of any lane is other than 1.
  static bool changes(F v) { return _mm512_cmp_ps_mask(v, set(1.0f), _CMP_NEQ_UQ) != 0; }

  static I columns(const int32_t* p) { return load_int(p); }
  static I columns(const uint16_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static F gather(const float* p, I at) { return _mm512_i32gather_ps(at, p, 4); }

  static F load_half(const uint16_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static void store_half(uint16_t* p, F v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, 0)); }
  static float half(uint16_t h) { return _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(h))); }
  static uint16_t half(float f) { return uint16_t(_mm_cvtsi128_si32(_mm_cvtps_ph(_mm_set_ss(f), 0))); }

  // What the KV cache holds, halves, signed codes or pairs of codes of 4 bits, as floats.
  static F widen(const uint16_t* p) { return load_half(p); }
  static F widen(const int8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))); }
  static F widen(const uint8_t* p) {
    const __m128i v = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)), low = _mm_set1_epi8(15);
    return to_float(_mm512_cvtepu8_epi32(_mm_unpacklo_epi8(_mm_and_si128(v, low), _mm_and_si128(_mm_srli_epi16(v, 4), low))));
  }
  static float widen(uint16_t h) { return half(h); }
  static float widen(int8_t code) { return float(code); }

  static F round(F v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n of n + kToWhole (elementwise.h), n from −127, which gives 0, to 127.
  static F exp2_whole(F v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(v), 23)); }

  static I zero_int() { return _mm512_setzero_si512(); }
  static I set_int(int32_t v) { return _mm512_set1_epi32(v); }
  static I load_int(const void* p) { return _mm512_loadu_si512(p); }
  static I load_bytes(const uint8_t* p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static I sub_int(I a, I b) { return _mm512_sub_epi32(a, b); }
  static I mul_int(I a, I b) { return _mm512_mullo_epi32(a, b); }
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm512_cvtps_epi32(v); }
  // Bits 8…15 of every lane, rounded so that 256 times them and the signed low byte make the lane again.
  static I high_byte(I v) { return _mm512_srai_epi32(_mm512_add_epi32(v, _mm512_set1_epi32(128)), 8); }
  // The low byte of every lane.
  static void store_bytes(int8_t* p, I v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(v)); }
  static void store_int(void* p, I v) { _mm512_storeu_si512(p, v); }
  // Four vectors as bytes, in their order; what a byte does not hold becomes −128 or 127.
  static I pack(I a, I b, I c, I d) {
    const I quarters = _mm512_packs_epi16(_mm512_packs_epi32(a, b), _mm512_packs_epi32(c, d));
    return _mm512_permutexvar_epi32(_mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15), quarters);
  }
  static I clamp_bytes(I v, int low, int high) { return _mm512_max_epi8(_mm512_set1_epi8(char(low)), _mm512_min_epi8(_mm512_set1_epi8(char(high)), v)); }
  // The low four bits of every byte, two bytes in one.
  static void store_half_bytes(uint8_t* p, I v) {
    const I pairs = _mm512_maddubs_epi16(_mm512_and_si512(v, _mm512_set1_epi8(15)), _mm512_set1_epi16(0x1001));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi16_epi8(pairs));
  }
  // The low four bits of every lane, two lanes a byte.
  static void store_nibbles(uint8_t* p, I v) {
    const __m128i bytes = _mm_and_si128(_mm512_cvtepi32_epi8(v), _mm_set1_epi8(15));
    const __m128i pairs = _mm_maddubs_epi16(bytes, _mm_set1_epi16(0x1001));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(pairs, pairs));
  }

  // Codes of every lane's word less 2^(bits−1): two's complement for 8 bits; for 4 bits the table of code() sees to it.
  template <int bits>
  static I centre(I word) {
    return bits == 8 ? _mm512_xor_si512(word, _mm512_set1_epi32(int32_t(0x80808080))) : word;
  }

  // Code i of every lane's centred word, as float. A permute of a table looks at the low four bits of an index alone, which saves a mask.
  template <int bits, int i>
  static F code(I word) {
    constexpr int shift = bits == 8 ? 8 * i : (i % 4) * 8 + (i / 4) * 4;
    if constexpr (bits == 4) {
      const F table = _mm512_setr_ps(-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7);
      return _mm512_permutexvar_ps(shift ? _mm512_srli_epi32(word, shift) : word, table);
    } else {
      return _mm512_cvtepi32_ps(_mm512_srai_epi32(_mm512_slli_epi32(word, 24 - shift), 24));
    }
  }

  // sum + Σ code·x over a word's inputs; x holds them as i8, four to an int32.
  template <int bits>
  static I dot(I sum, I word, const int8_t* x) {
    if constexpr (bits == 8) return _mm512_dpbusd_epi32(sum, word, broadcast4(x));
    const I low = _mm512_set1_epi8(15);
    sum = _mm512_dpbusd_epi32(sum, _mm512_and_si512(word, low), broadcast4(x));
    return _mm512_dpbusd_epi32(sum, _mm512_and_si512(_mm512_srli_epi16(word, 4), low), broadcast4(x + 4));
  }

 private:
  static F add_quarters(F a, F b) { return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd)); }
  static I broadcast4(const int8_t* x) {
    int32_t four;
    __builtin_memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }
};

}  // namespace pe
