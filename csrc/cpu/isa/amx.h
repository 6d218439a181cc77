// The tile registers of AMX and the bf16 and i8 that they multiply: eight tiles of 16 rows of 64 bytes. What vectors do beside them is avx512.h's.
//
// Inline assembly instead of the compiler's intrinsics: GCC 12's _tile_loadconfig tells the optimizer of 8 of the 64 bytes it reads, and
// its loads and stores of tiles claim no memory, so that writes to a buffer move past them.
#pragma once

#include "cpu/isa/avx512.h"

namespace pe {

namespace {
inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
}  // namespace

struct Amx {
  static constexpr int64_t rows = 16, inputs = 32;          // of a bf16 tile: 16 rows of 32, or 16 pairs of inputs for 16 outputs
  static constexpr int64_t elements = rows * inputs;

  // Rounds to bf16; lane i holds (low[i], high[i]): a row of the right operand, whose inputs come in pairs.
  static __m512i pairs(__m512 low, __m512 high) {
    alignas(64) static constexpr uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    return _mm512_permutexvar_epi16(_mm512_load_si512(order), round(low, high));
  }

  // Rounds 32 floats to bf16, in their order.
  static __m512i round(__m512 first, __m512 second) {
#if defined(PE_EMULATE_AVX512)
    return emulated::round_bf16(first, second);
#else
    return __m512i(_mm512_cvtne2ps_pbh(second, first));
#endif
  }

  // The matrix unit falls asleep when it has had nothing to do for 0.5 to 0.9 us, and takes 0.3 us to wake: some product of three tiles that
  // are used for nothing else, and hold zeros since begin(), between pieces of other work.
  template <int sum, int left, int right>
  static void stay_awake() { multiply<sum, left, right>(); }

#if defined(PE_EMULATE_AVX512)
  static void begin() { emulated::tile.begin(); }
  static void end() { emulated::tile.end(); }
  template <int tile>
  static void load(const void* p, int64_t stride) { emulated::tile[tile].load(p, stride); }
  template <int tile>
  static void store(void* p, int64_t stride) { emulated::tile[tile].store(p, stride); }
  template <int tile>
  static void zero() { emulated::tile[tile] = {}; }
  template <int sum, int left, int right>
  static void multiply() { emulated::tile[sum].add_product(emulated::tile[left], emulated::tile[right]); }
  template <int sum, int left, int right>
  static void multiply_int8() { emulated::tile[sum].add_int8_product(emulated::tile[left], emulated::tile[right]); }
#else
  // All eight tiles at full size. Between begin() and end() a context switch saves 8 KiB more.
  static void begin() {
    struct Config {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    asm volatile("ldtilecfg %0" ::"m"(config));
  }
  static void end() { asm volatile("tilerelease" ::: "memory"); }

  template <int tile>
  static void load(const void* p, int64_t stride) {  // stride in bytes
    asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(p), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void store(void* p, int64_t stride) {
    asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(p), "r"(stride), "i"(tile) : "memory");
  }
  template <int tile>
  static void zero() {
    asm volatile("tilezero %%tmm%c0" ::"i"(tile));
  }
  // sum f32[16][16] += left bf16[16][32] · right bf16[16 pairs][16].
  template <int sum, int left, int right>
  static void multiply() {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
  }
  // sum i32[16][16] += left i8[16][64] · right i8[16 fours][16].
  template <int sum, int left, int right>
  static void multiply_int8() {
    asm volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(sum), "i"(left), "i"(right));
  }
#endif
};

}  // namespace pe
