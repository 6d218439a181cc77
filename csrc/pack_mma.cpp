// Canonical weights and outliers ↔ layout mma (ops.h). Once a load, in the CPU's memory.
#include "pack_mma.h"

#include <cstring>

#include "cpu/threads.h"

namespace pe {
namespace mma {
namespace {

// Where the code of output r and input c lies: the byte, and the shift of its nibble.
struct Place {
  size_t byte;
  int shift;
};

Place place(const QLinear& op, int64_t r, int64_t c) {
  const int64_t tile = r / kTile * blocks_of(op.k, kTile) + c / kTile, band = r % kTile / kBand;
  const int64_t high = r % kBand / 8, g = r % 8, t = c % 32 / 8;
  const int64_t step = c % kTile / 32 * 2 + c % 8 / 4, pair = c % 4 / 2 * 2 + high, second = c % 2, lane = g * 4 + t;
  const int64_t tile_base = tile * kTile * kTile * op.bits / 8;
  if (op.bits == 4) {
    const int64_t nibble = pair + 4 * second;
    return {size_t(tile_base + (band * 32 + lane) * 16 + step * 4 + nibble / 2), int(nibble % 2 * 4)};
  }
  return {size_t(tile_base + ((band * 2 + step / 2) * 32 + lane) * 16 + step % 2 * 8 + pair * 2 + second), 0};
}

// Where the scale and the zero of output r and group g lie.
size_t group_place(const QLinear& op, int64_t r, int64_t g) {
  return size_t((r / kTile * (op.k / op.group) + g) * kTile + r % 8 * 8 + r % kTile / kBand * 2 + r % kBand / 8);
}

uint8_t code(const QLinear& op, int64_t r, int64_t c) {
  if (op.bits == 8) return op.weight[r * op.k + c];
  return (op.weight[r * ((op.k + 1) / 2) + c / 2] >> (c % 2 * 4)) & 15;
}

template <class T>
void move_groups(const QLinear& op, const T* from, T* to, bool inverse) {
  const int64_t groups = op.k / op.group;
  for (int64_t r = 0; r < op.n; ++r)
    for (int64_t g = 0; g < groups; ++g) {
      const size_t packed = group_place(op, r, g), plain = size_t(r * groups + g);
      inverse ? to[plain] = from[packed] : to[packed] = from[plain];
    }
}

void move_all_groups(const QLinear& op, void* scale, uint8_t* zero, bool inverse) {
  if (op.scale_f32)
    move_groups(op, static_cast<const uint32_t*>(op.scale), static_cast<uint32_t*>(scale), inverse);
  else
    move_groups(op, static_cast<const uint16_t*>(op.scale), static_cast<uint16_t*>(scale), inverse);
  if (op.zero) move_groups(op, op.zero, zero, inverse);
}

}  // namespace

PackedBytes packed_bytes(const QLinear& op) {
  const int64_t n = blocks_of(op.n, kTile) * kTile, k = blocks_of(op.k, kTile) * kTile, groups = op.k / op.group;
  return {size_t(n * k * op.bits / 8), size_t(n * groups * (op.scale_f32 ? 4 : 2)), op.zero ? size_t(n * groups) : 0};
}

void pack(const QLinear& op, uint8_t* weight, void* scale, uint8_t* zero) {
  const PackedBytes bytes = packed_bytes(op);
  std::memset(weight, 0, bytes.weight);
  std::memset(scale, 0, bytes.scale);
  if (op.zero) std::memset(zero, 0, bytes.zero);
  parallel_for(blocks_of(op.n, kTile), 1, [&](int64_t begin, int64_t end) {  // tiles share no byte
    for (int64_t r = begin * kTile; r < std::min(end * kTile, op.n); ++r)
      for (int64_t c = 0; c < op.k; ++c) {
        const Place p = place(op, r, c);
        weight[p.byte] |= uint8_t(code(op, r, c) << p.shift);
      }
  });
  move_all_groups(op, scale, zero, false);
}

void unpack(const QLinear& op, uint8_t* weight, void* scale, uint8_t* zero) {
  const int64_t width = op.bits == 8 ? op.k : (op.k + 1) / 2;
  std::memset(weight, 0, size_t(op.n * width));
  for (int64_t r = 0; r < op.n; ++r)
    for (int64_t c = 0; c < op.k; ++c) {
      const Place p = place(op, r, c);
      const uint8_t byte = op.weight[p.byte];
      if (op.bits == 8)
        weight[r * width + c] = byte;
      else
        weight[r * width + c / 2] |= uint8_t(((byte >> p.shift) & 15) << (c % 2 * 4));
    }
  move_all_groups(op, scale, zero, true);
}

static size_t sums_bytes(const QLinear& op) {
  auto bytes = [](Split split, int64_t outputs, int64_t sums) {
    return split.count > 1 ? kCounterBytes + size_t(outputs * split.count * sums) * 4 : 0;
  };
  const int64_t bands = blocks_of(op.n, kTile);
  size_t most = 0;
  for (const int width : {8, 16}) most = std::max(most, bytes(decode_split(op, width), bands, kTile * width));
  if (op.m == 0) return most;
  for (const int tokens : {gemm_tokens(op), 64})  // what is asked for; on sm_90a at least 64, and at most where shared memory is small
    most = std::max(most, bytes(gemm_split(op, tokens), gemm_blocks(op, tokens), kGemmOutputs * tokens));
  return most;
}

CodesPlace codes_place(const QLinear& op) {
  const size_t code = std::max(kCounterBytes, size_t(blocks_of(int64_t(sums_bytes(op)), 64) * 64));
  const size_t scale = code + size_t(blocks_of(op.m * op.k * op.act_bits / 8, 64) * 64);
  return {code, scale, scale + size_t(op.m) * 4};
}

size_t workspace_bytes(const QLinear& op) { return op.act_bits < 16 && !op.x_code ? codes_place(op).end : sums_bytes(op); }

}  // namespace mma

namespace {

int64_t outlier_column(const QLinear& op, int64_t e) {
  return op.k > 65536 ? static_cast<const int32_t*>(op.outlier_col)[e] : static_cast<const uint16_t*>(op.outlier_col)[e];
}

}  // namespace

OutlierCounts outlier_counts(const QLinear& op) {
  const int64_t bands = mma::blocks_of(op.n, mma::kTile) * (mma::kTile / mma::kBand), tiles = mma::blocks_of(op.k, mma::kTile);
  return {size_t(bands * tiles + 1), size_t(mma::blocks_of(op.outlier_row[op.n], 4) * 4)};
}

// A counting sort by tile: rows and columns rise in the CSR, so they do within a tile.
void pack_outliers(const QLinear& op, uint32_t* offset, uint32_t* entry) {
  const OutlierCounts counts = outlier_counts(op);
  const int64_t tiles = mma::blocks_of(op.k, mma::kTile);
  std::memset(offset, 0, counts.offset * 4);
  std::memset(entry, 0, counts.entry * 4);
  auto each = [&](auto&& visit) {
    for (int64_t r = 0; r < op.n; ++r)
      for (int64_t e = op.outlier_row[r]; e < op.outlier_row[r + 1]; ++e) {
        const int64_t c = outlier_column(op, e);
        visit(r, c, e, size_t(r / mma::kBand * tiles + c / mma::kTile));
      }
  };
  // offset[tile + 1] counts the tile, then it is where the tile begins, and at last where it ends: where the next one begins.
  each([&](int64_t, int64_t, int64_t, size_t tile) { ++offset[tile + 1]; });
  uint32_t before = 0;
  for (size_t i = 1; i < counts.offset; ++i) {
    const uint32_t count = offset[i];
    offset[i] = before;
    before += count;
  }
  each([&](int64_t r, int64_t c, int64_t e, size_t tile) {
    entry[offset[tile + 1]++] = uint32_t(op.outlier_value[e]) << 16 | uint32_t(r % mma::kBand) << 12 | uint32_t(c % mma::kSpan);
  });
}

void unpack_outliers(const QLinear& op, int32_t* row, void* col, uint16_t* value) {
  const int64_t tiles = mma::blocks_of(op.k, mma::kTile);
  int32_t count = 0;
  for (int64_t r = 0; r < op.n; ++r) {
    row[r] = count;
    for (int64_t t = 0; t < tiles; ++t) {
      const size_t tile = size_t(r / mma::kBand * tiles + t);
      for (uint32_t i = op.outlier_offset[tile]; i < op.outlier_offset[tile + 1]; ++i) {
        const uint32_t e = op.outlier_entry[i];
        if ((e >> 12 & 15) != uint32_t(r % mma::kBand)) continue;
        const int64_t c = t * mma::kTile / mma::kSpan * mma::kSpan + (e & 4095);
        if (op.k > 65536)
          static_cast<int32_t*>(col)[count] = int32_t(c);
        else
          static_cast<uint16_t*>(col)[count] = uint16_t(c);
        value[count++] = uint16_t(e >> 16);
      }
    }
  }
  row[op.n] = count;
}

}  // namespace pe
