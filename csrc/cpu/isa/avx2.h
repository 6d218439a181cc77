// Eight lanes of AVX2 with FMA and F16C: the vocabulary that the kernels of csrc/cpu are written in.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "dispatch.h"

namespace pe {

struct Avx2 {
  static constexpr int lanes = 8;
  static constexpr Arch arch = Arch::avx2;
  static constexpr Layout layout = Layout::tile8;
  // Tokens that a matrix kernel takes at once, beside two tiles: 8 sums hide the adder's latency of 4 on two ports, and with two codes
  // and an activation they leave 5 of 16 registers free.
  static constexpr int tokens = 4;
  static constexpr int planes = 0;  // 16-bit activations stay f32: without VNNI an integer dot product takes five instructions

  using F = __m256;
  using I = __m256i;

  static F zero() { return _mm256_setzero_ps(); }
  static F set(float v) { return _mm256_set1_ps(v); }
  static F load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, F v) { _mm256_storeu_ps(p, v); }
  static I first(int count) { return _mm256_cmpgt_epi32(_mm256_set1_epi32(count), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)); }
  static F load(const float* p, int count) { return _mm256_maskload_ps(p, first(count)); }
  static void store(float* p, F v, int count) { _mm256_maskstore_ps(p, first(count), v); }
  static F add(F a, F b) { return _mm256_add_ps(a, b); }
  static F sub(F a, F b) { return _mm256_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm256_mul_ps(a, b); }
  static F div(F a, F b) { return _mm256_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm256_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm256_max_ps(a, b); }
  static F min(F a, F b) { return _mm256_min_ps(a, b); }
  static F abs(F a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
  static float sum(F v) {
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
  }
  // Lane j of v[i] and lane i of v[j] change places.
  static void transpose(F (&v)[8]) {
    F t[8];
    for (int i = 0; i < 8; i += 2) t[i] = _mm256_unpacklo_ps(v[i], v[i + 1]), t[i + 1] = _mm256_unpackhi_ps(v[i], v[i + 1]);
    for (int i = 0; i < 8; i += 4)
      for (int j = 0; j < 2; ++j) {
        const __m256d a = _mm256_castps_pd(t[i + j]), b = _mm256_castps_pd(t[i + j + 2]);
        v[i + 2 * j] = _mm256_castpd_ps(_mm256_unpacklo_pd(a, b)), v[i + 2 * j + 1] = _mm256_castpd_ps(_mm256_unpackhi_pd(a, b));
      }
    for (int i = 0; i < 4; ++i) t[i] = _mm256_permute2f128_ps(v[i], v[4 + i], 0x20), t[4 + i] = _mm256_permute2f128_ps(v[i], v[4 + i], 0x31);
    for (int i = 0; i < 8; ++i) v[i] = t[i];
  }
  // Lane i is the sum of v[i]'s lanes.
  static F sum_each(const F (&v)[8]) {
    F four[2];
    for (int i = 0; i < 2; ++i) four[i] = _mm256_hadd_ps(_mm256_hadd_ps(v[4 * i], v[4 * i + 1]), _mm256_hadd_ps(v[4 * i + 2], v[4 * i + 3]));
    return add(_mm256_permute2f128_ps(four[0], four[1], 0x20), _mm256_permute2f128_ps(four[0], four[1], 0x31));
  }
  static float largest(F v) {
    __m128 s = _mm_max_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_max_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_max_ss(s, _mm_movehdup_ps(s)));
  }
  // a where limit ≥ value, else b.
  static F where_reaches(F limit, F value, F a, F b) { return _mm256_blendv_ps(b, a, _mm256_cmp_ps(limit, value, _CMP_GE_OQ)); }

  static I columns(const int32_t* p) { return load_int(p); }
  static I columns(const uint16_t* p) { return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static F gather(const float* p, I at) { return _mm256_i32gather_ps(p, at, 4); }

  static F load_half(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static void store_half(uint16_t* p, F v) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, 0)); }
  static float half(uint16_t h) { return _cvtsh_ss(h); }
  static uint16_t half(float f) { return _cvtss_sh(f, 0); }

  // What the KV cache holds, halves, signed codes or pairs of codes of 4 bits, as floats.
  static F widen(const uint16_t* p) { return load_half(p); }
  static F widen(const int8_t* p) { return to_float(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)))); }
  static F widen(const uint8_t* p) {
    int32_t pairs;
    __builtin_memcpy(&pairs, p, 4);
    const __m128i v = _mm_cvtsi32_si128(pairs), low = _mm_set1_epi8(15);
    const __m128i codes = _mm_unpacklo_epi8(_mm_and_si128(v, low), _mm_and_si128(_mm_srli_epi16(v, 4), low));
    return to_float(_mm256_cvtepu8_epi32(codes));
  }
  static float widen(uint16_t h) { return half(h); }
  static float widen(int8_t code) { return float(code); }

  static F round(F v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n of n + kToWhole (elementwise.h), n from −127, which gives 0, to 127.
  static F exp2_whole(F v) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(v), 23)); }

  static I zero_int() { return _mm256_setzero_si256(); }
  static I set_int(int32_t v) { return _mm256_set1_epi32(v); }
  static I load_int(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
  static I load_bytes(const uint8_t* p) { return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static I sub_int(I a, I b) { return _mm256_sub_epi32(a, b); }
  static I mul_int(I a, I b) { return _mm256_mullo_epi32(a, b); }
  static F to_float(I v) { return _mm256_cvtepi32_ps(v); }
  static I to_int(F v) { return _mm256_cvtps_epi32(v); }
  // Bits 8…15 of every lane, rounded so that 256 times them and the signed low byte make the lane again.
  static I high_byte(I v) { return _mm256_srai_epi32(_mm256_add_epi32(v, _mm256_set1_epi32(128)), 8); }
  // The low byte of every lane.
  static void store_bytes(int8_t* p, I v) {
    const I packed = _mm256_shuffle_epi8(v, _mm256_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, 0, 4, 8, 12, -1, -1, -1,
                                                             -1, -1, -1, -1, -1, -1, -1, -1, -1));
    const I both = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 1, 1, 1, 1, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(both));
  }
  static void store_int(void* p, I v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
  // Four vectors as bytes, in their order; what a byte does not hold becomes −128 or 127.
  static I pack(I a, I b, I c, I d) {
    const I halves = _mm256_packs_epi16(_mm256_packs_epi32(a, b), _mm256_packs_epi32(c, d));
    return _mm256_permutevar8x32_epi32(halves, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
  }
  static I clamp_bytes(I v, int low, int high) { return _mm256_max_epi8(_mm256_set1_epi8(char(low)), _mm256_min_epi8(_mm256_set1_epi8(char(high)), v)); }
  // The low four bits of every byte, two bytes in one.
  static void store_half_bytes(uint8_t* p, I v) {
    const I pairs = _mm256_maddubs_epi16(_mm256_and_si256(v, _mm256_set1_epi8(15)), _mm256_set1_epi16(0x1001));
    const I packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(pairs, pairs), 0b1000);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(packed));
  }
  // The low four bits of every lane, two lanes a byte.
  static void store_nibbles(uint8_t* p, I v) {
    alignas(8) int8_t bytes[8];
    store_bytes(bytes, v);
    const __m128i low = _mm_and_si128(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes)), _mm_set1_epi8(15));
    const __m128i pairs = _mm_maddubs_epi16(low, _mm_set1_epi16(0x1001));
    const int32_t packed = _mm_cvtsi128_si32(_mm_packus_epi16(pairs, pairs));
    __builtin_memcpy(p, &packed, 4);
  }

  // Codes of every lane's word less 2^(bits−1): two's complement, so that two shifts widen one.
  template <int bits>
  static I centre(I word) {
    return _mm256_xor_si256(word, _mm256_set1_epi8(bits == 8 ? char(0x80) : char(0x88)));
  }

  // Code i of every lane's centred word, as float.
  template <int bits, int i>
  static F code(I word) {
    constexpr int shift = bits == 8 ? 8 * i : (i % 4) * 8 + (i / 4) * 4;
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(word, 32 - bits - shift), 32 - bits));
  }

  // sum + Σ code·x over a word's inputs; x holds them as i8, four to an int32. There is no u8·i8 dot product that cannot saturate
  // before VNNI, so codes go through vpmaddubsw as nibbles: 2 · 15 · 127 fits int16.
  template <int bits>
  static I dot(I sum, I word, const int8_t* x) {
    const I low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
    const I even = _mm256_and_si256(word, low), odd = _mm256_and_si256(_mm256_srli_epi16(word, 4), low);
    const I a = _mm256_maddubs_epi16(even, broadcast4(x));
    if constexpr (bits == 4) {
      const I b = _mm256_maddubs_epi16(odd, broadcast4(x + 4));
      return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_add_epi16(a, b), ones));
    } else {
      const I b = _mm256_maddubs_epi16(odd, broadcast4(x));
      return _mm256_add_epi32(sum, _mm256_add_epi32(_mm256_madd_epi16(a, ones), _mm256_madd_epi16(b, _mm256_set1_epi16(16))));
    }
  }

 private:
  static I broadcast4(const int8_t* x) { return _mm256_castps_si256(_mm256_broadcast_ss(reinterpret_cast<const float*>(x))); }
};

}  // namespace pe
