// Peak rates by loops that do nothing else: independent accumulators, enough to cover the latency of an instruction, all in registers.
#include "roofline.h"

#include <cstdint>
#include <cstring>

#include "cpu/threads.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace bench {
namespace {

constexpr int kRuns = 21;

// Operations a second of `loop`, which does `ops` of them in every thread.
template <class F>
double rate(double ops, F&& loop) {
  const int threads = pe::threads();
  const double us = median_us(kRuns, [&](int) {
    pe::parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) loop();
    });
  });
  return ops * threads / us / 1e3;
}

template <class T>
void keep(T& value) {
  asm volatile("" : "+m"(value));
}

#if defined(__x86_64__) && defined(__GLIBC__)  // which resolves clones at load
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
uint64_t read_words(const uint64_t* data, size_t count) {
  uint64_t sum[32] = {};
  for (size_t i = 0; i + 32 <= count; i += 32)
    for (size_t j = 0; j < 32; ++j) sum[j] ^= data[i + j];
  for (size_t j = 1; j < 32; ++j) sum[0] ^= sum[j];
  return sum[0];
}

#if defined(__x86_64__)
constexpr int kLoop = 400000, kLanes = 12;  // 12 accumulators cover 4 to 5 cycles of latency at 2 instructions a cycle

__attribute__((target("avx2,fma"))) void fma_ymm() {
  __m256 sum[kLanes], a = _mm256_set1_ps(1e-3f);
  for (auto& s : sum) s = a;
  for (int i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kLanes; ++j) sum[j] = _mm256_fmadd_ps(a, a, sum[j]);
  for (auto& s : sum) keep(s);
}

__attribute__((target("avx512f"))) void fma_zmm() {
  __m512 sum[kLanes], a = _mm512_set1_ps(1e-3f);
  for (auto& s : sum) s = a;
  for (int i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kLanes; ++j) sum[j] = _mm512_fmadd_ps(a, a, sum[j]);
  for (auto& s : sum) keep(s);
}

__attribute__((target("avx512f,avx512vnni"))) void vnni_zmm() {
  __m512i sum[kLanes], a = _mm512_set1_epi8(1);
  for (auto& s : sum) s = a;
  for (int i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kLanes; ++j) sum[j] = _mm512_dpbusd_epi32(sum[j], a, a);
  for (auto& s : sum) keep(s);
}

__attribute__((target("avx512f,avx512bf16"))) void bf16_zmm() {
  __m512 sum[kLanes], one = _mm512_set1_ps(1);
  const auto a = __m512bh(one);  // 0 and 1 by turns
  for (auto& s : sum) s = one;
  for (int i = 0; i < kLoop; ++i)
#pragma GCC unroll 12
    for (int j = 0; j < kLanes; ++j) sum[j] = _mm512_dpbf16_ps(sum[j], a, a);
  for (auto& s : sum) keep(s);
}

// Tiles 0-3 accumulate 16 x 16 words; 4-5 and 6-7 hold 64-byte rows of both sides.
void configure_tiles() {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  static_assert(sizeof config == 64);
  // Not _tile_loadconfig: that of GCC 12 says that it reads 8 bytes, and the others are then never written.
  asm volatile("ldtilecfg %0" ::"m"(config));
  asm volatile(
      "tilezero %tmm0\n tilezero %tmm1\n tilezero %tmm2\n tilezero %tmm3\n tilezero %tmm4\n tilezero %tmm5\n tilezero %tmm6\n tilezero "
      "%tmm7");
}

constexpr int kTileLoop = 50000;

void amx_int8() {
  configure_tiles();
  for (int i = 0; i < kTileLoop; ++i)
    asm volatile(
        "tdpbusd %tmm6, %tmm4, %tmm0\n tdpbusd %tmm7, %tmm4, %tmm1\n"
        "tdpbusd %tmm6, %tmm5, %tmm2\n tdpbusd %tmm7, %tmm5, %tmm3");
  asm volatile("tilerelease");
}

void amx_bf16() {
  configure_tiles();
  for (int i = 0; i < kTileLoop; ++i)
    asm volatile(
        "tdpbf16ps %tmm6, %tmm4, %tmm0\n tdpbf16ps %tmm7, %tmm4, %tmm1\n"
        "tdpbf16ps %tmm6, %tmm5, %tmm2\n tdpbf16ps %tmm7, %tmm5, %tmm3");
  asm volatile("tilerelease");
}

// CPUID leaf 7, edx: bit 22 AMX-BF16, 24 the tiles, 25 AMX-INT8; GCC 12's __builtin_cpu_supports does not know them. Linux gives the tiles'
// registers (state component 18) to those who ask.
bool has_amx([[maybe_unused]] unsigned bit) {
#if defined(__linux__)
  constexpr unsigned kLeaf = 7, kTiles = 24, kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(kLeaf, 0, &a, &b, &c, &d) && (d >> kTiles & 1) && (d >> bit & 1) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

void measure_x86(Roofline& r) {
  const bool avx512 = __builtin_cpu_supports("avx512f");
  const double vectors = double(kLoop) * kLanes, tiles = double(kTileLoop) * 4;
  if (avx512)
    r.fp32_gop_s = rate(vectors * 16 * 2, fma_zmm);
  else if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    r.fp32_gop_s = rate(vectors * 8 * 2, fma_ymm);
  if (avx512 && __builtin_cpu_supports("avx512vnni")) r.vnni_gop_s = rate(vectors * 64 * 2, vnni_zmm);
  if (avx512 && __builtin_cpu_supports("avx512bf16")) r.bf16_gop_s = rate(vectors * 32 * 2, bf16_zmm);
  if (has_amx(25)) r.amx_int8_gop_s = rate(tiles * 16 * 16 * 64 * 2, amx_int8);
  if (has_amx(22)) r.amx_bf16_gop_s = rate(tiles * 16 * 16 * 32 * 2, amx_bf16);
}
#endif

// Where there is no vector loop above: what the compiler makes of plain C++.
void fma_plain() {
  float sum[16], a = 1e-3f;
  for (auto& s : sum) s = a;
  for (int i = 0; i < 100000; ++i) {
    keep(a);
    for (auto& s : sum) s += a * a;
  }
  keep(sum);
}

}  // namespace

double Roofline::int_gop_s() const { return std::max({fp32_gop_s, vnni_gop_s, amx_int8_gop_s}); }
double Roofline::float_gop_s() const { return std::max({fp32_gop_s, bf16_gop_s, amx_bf16_gop_s}); }

Roofline measure_roofline(const void* data, size_t bytes) {
  Roofline r;
  const auto* words = static_cast<const uint64_t*>(data);
  const size_t count = bytes / 8, piece = size_t(1) << 21;  // 16 MiB; a thread that is held up takes fewer
  const double us = median_us(5, [&](int) {
    pe::parallel_for(int64_t(count / piece), 1, [&](int64_t begin, int64_t end) {
      uint64_t sum = read_words(words + size_t(begin) * piece, size_t(end - begin) * piece);
      keep(sum);
    });
  });
  r.read_gb_s = double(count / piece * piece * 8) / us / 1e3;
#if defined(__x86_64__)
  measure_x86(r);
#endif
  if (r.fp32_gop_s == 0) r.fp32_gop_s = rate(100000.0 * 16 * 2, fma_plain);
  return r;
}

}  // namespace bench
