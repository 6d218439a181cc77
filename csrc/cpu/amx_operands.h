// Floats as operands of a product on AMX, rounded to bf16: left ones in tiles [16 rows][32 inner indices], right ones in tiles
// [16 pairs of inner indices][16 columns]. Sizes that are no whole tiles leave what the tiles held before, which should be zeros.
#pragma once

#include "cpu/isa/amx.h"

namespace pe {
namespace {

// Tiles that follow each other, `wide` of them for the same rows.
struct AmxOperand {
  uint16_t* tiles;
  int64_t wide;
  uint16_t* tile(int64_t r, int64_t c) const { return tiles + (r * wide + c) * Amx::elements; }
};

// 16 columns from c on of a row of `count` floats; zeros beyond it, and without a row.
inline Avx512::F amx_columns(const float* row, int64_t c, int64_t count) {
  const int64_t left = row ? count - c : 0;
  return left >= 16 ? Avx512::load(row + c) : left > 0 ? Avx512::load(row + c, int(left)) : Avx512::zero();
}

// rows[count][width], `stride` apart, as a right operand.
inline void amx_right_operand(const float* rows, int64_t stride, int64_t count, int64_t width, const AmxOperand& to) {
  for (int64_t r = 0; r < count; r += 2)
    for (int64_t c = 0; c < width; c += 16) {
      const float *low = rows + r * stride, *high = r + 1 < count ? low + stride : nullptr;
      _mm512_store_si512(to.tile(r / 32, c / 16) + r % 32 * 16, Amx::pairs(amx_columns(low, c, width), amx_columns(high, c, width)));
    }
}

}  // namespace
}  // namespace pe
