// Canonical ↔ tiled weights (ops.h, Layout), and the workspace that kernels share.
#include <algorithm>
#include <cstring>

#include "attention_parts.h"
#include "cpu/threads.h"
#include "ops.h"
#include "pack_mma.h"

namespace pe {
namespace {

int64_t round_up(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// Where input c of row r lies in a tiled weight: the byte, and the shift of its nibble.
struct Place {
  size_t byte;
  int shift;
};

Place place(const QLinear& op, int64_t rows, int64_t r, int64_t c) {
  const int64_t inputs = 32 / op.bits, words = round_up(op.k, 8) / inputs;
  const int64_t word = ((r / rows) * words + c / inputs) * rows + r % rows;
  return {size_t(word * 4 + c % 4), op.bits == 4 && c % 8 >= 4 ? 4 : 0};
}

uint8_t code(const QLinear& op, int64_t r, int64_t c) {
  if (op.bits == 8) return op.weight[r * op.k + c];
  return (op.weight[r * ((op.k + 1) / 2) + c / 2] >> (c % 2 * 4)) & 15;
}

// The word of 8 inputs of 4 bits, or of 4 of 8, that canonical bytes make: input 4 + b goes above input b.
uint32_t word(const QLinear& op, const uint8_t* from) {
  uint32_t bytes;
  std::memcpy(&bytes, from, 4);
  if (op.bits == 8) return bytes;
  const uint32_t low = bytes & 0x0f0f0f0f, high = bytes >> 4 & 0x0f0f0f0f;  // inputs 0 2 4 6 and 1 3 5 7
  const uint32_t first = (low & 0xff) | (high & 0xff) << 8 | (low & 0xff00) << 8 | (high & 0xff00) << 16;
  const uint32_t second = (low >> 16 & 0xff) | (high >> 16 & 0xff) << 8 | (low >> 24) << 16 | (high >> 24) << 24;
  return first | second << 4;
}

template <class T>
void tile(const QLinear& op, int64_t rows, const T* from, T* to, bool inverse) {
  const int64_t groups = op.k / op.group;
  for (int64_t r = 0; r < op.n; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t tiled = ((r / rows) * groups + g) * rows + r % rows, plain = r * groups + g;
      inverse ? to[plain] = from[tiled] : to[tiled] = from[plain];
    }
}

void tile_all(const QLinear& op, int64_t rows, void* scale, uint8_t* zero, bool inverse) {
  if (op.scale_f32)
    tile(op, rows, static_cast<const uint32_t*>(op.scale), static_cast<uint32_t*>(scale), inverse);
  else
    tile(op, rows, static_cast<const uint16_t*>(op.scale), static_cast<uint16_t*>(scale), inverse);
  if (op.zero) tile(op, rows, op.zero, zero, inverse);
}

}  // namespace

PackedBytes packed_bytes(const QLinear& op, Layout layout) {
  if (layout == Layout::mma) return mma::packed_bytes(op);
  const int64_t n = round_up(op.n, int64_t(layout)), groups = op.k / op.group;
  return {size_t(n * round_up(op.k, 8) * op.bits / 8), size_t(n * groups * (op.scale_f32 ? 4 : 2)), op.zero ? size_t(n * groups) : 0};
}

void pack(const QLinear& op, Layout layout, uint8_t* weight, void* scale, uint8_t* zero) {
  if (layout == Layout::mma) return mma::pack(op, weight, scale, zero);
  const int64_t rows = int64_t(layout);
  const PackedBytes bytes = packed_bytes(op, layout);
  std::memset(weight, 0, bytes.weight);
  std::memset(scale, 0, bytes.scale);
  if (op.zero) std::memset(zero, 0, bytes.zero);
  const int64_t inputs = 32 / op.bits, words = round_up(op.k, 8) / inputs, whole = op.k / 8 * 8 / inputs;
  parallel_for(round_up(op.n, rows) / rows, 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin * rows; r < std::min(end * rows, op.n); ++r) {
      const uint8_t* from = op.weight + r * (op.bits == 8 ? op.k : (op.k + 1) / 2);
      for (int64_t w = 0; w < whole; ++w) {
        const uint32_t codes = word(op, from + 4 * w);
        std::memcpy(weight + ((r / rows * words + w) * rows + r % rows) * 4, &codes, 4);
      }
      for (int64_t c = whole * inputs; c < op.k; ++c) {
        const Place p = place(op, rows, r, c);
        weight[p.byte] |= uint8_t(code(op, r, c) << p.shift);
      }
    }
  });
  tile_all(op, rows, scale, zero, false);
}

size_t column_count(const QLinear& op, Layout layout) { return size_t(round_up(op.n, int64_t(layout)) * op.columns); }

void pack_columns(const QLinear& op, Layout layout, uint16_t* value) {
  const int64_t rows = int64_t(layout);
  std::memset(value, 0, column_count(op, layout) * sizeof *value);
  for (int64_t r = 0; r < op.n; ++r)
    for (int64_t j = 0; j < op.columns; ++j) value[(r / rows * op.columns + j) * rows + r % rows] = op.column_value[r * op.columns + j];
}

void unpack(const QLinear& op, uint8_t* weight, void* scale, uint8_t* zero) {
  if (op.layout == Layout::mma) return mma::unpack(op, weight, scale, zero);
  const int64_t rows = int64_t(op.layout), width = op.bits == 8 ? op.k : (op.k + 1) / 2;
  std::memset(weight, 0, size_t(op.n * width));
  for (int64_t r = 0; r < op.n; ++r)
    for (int64_t c = 0; c < op.k; ++c) {
      const Place p = place(op, rows, r, c);
      if (op.bits == 8)
        weight[r * width + c] = op.weight[p.byte];
      else
        weight[r * width + c / 2] |= uint8_t(((op.weight[p.byte] >> p.shift) & 15) << (c % 2 * 4));
    }
  tile_all(op, rows, scale, zero, true);
}

// Per token of a chunk: x as f32 and as two planes of i8, each padded to 8 inputs, two sums and a scale a group, x transposed in blocks
// of 16, the inputs of f16 columns, and the outputs that are still to be gated. Matrix units: x as bf16 in tiles of 16 × 32, which is more
// where k is tiny.
size_t workspace_bytes(const QLinear& op) {
  if (op.layout == Layout::mma) return mma::workspace_bytes(op);
  const size_t m = size_t(round_up(std::min(op.m, op.act_bits < 16 ? kMatrixChunk : kChunk), 16)), groups = size_t(op.k / op.group);
  const size_t k = size_t(round_up(op.k, 64)), floats = size_t(op.act_bits == 16) + size_t(op.outlier_row != nullptr);
  const size_t tiles = size_t(round_up(std::min(op.m, kMatrixChunk), 16) * round_up(op.k, 32)) * 2;
  return std::max(m * (floats * k * 4 + 2 * k + groups * 12 + size_t(op.columns) * 4 + (op.gated ? size_t(op.n) * 4 : 0)) + 7 * 64, tiles);
}

size_t workspace_bytes(const Attention& op) {
  if (op.dtype != Dtype::f32) return parts::workspace_bytes(op);
  if (op.m >= kFewRows || op.head_dim > kHeadDim) return 0;
  const int64_t length = op.cache.head_stride / op.head_dim, parts = (op.heads / op.kv_heads + kTogether - 1) / kTogether;
  return size_t(op.m * op.kv_heads * parts * (length / kSegment + 1)) * sizeof(Seen);
}

}  // namespace pe
