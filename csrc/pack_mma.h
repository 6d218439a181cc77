// Layout mma (ops.h): its packing, and how the kernels that read it share out the work, which decides what workspace they need.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops.h"

namespace pe::mma {

constexpr int kTile = 64;    // outputs and inputs of a tile
constexpr int kBand = 16;    // outputs of a tensor-core instruction
constexpr int kSpan = 4096;  // inputs that an outlier's entry can tell apart

inline int64_t blocks_of(int64_t count, int64_t size) { return (count + size - 1) / size; }

// How many blocks share the inputs of one tile of y, and how many tiles of 64 inputs each of them takes. It depends on the shape alone
// and not on the GPU, so that GPUs that use one kernel and tile give the same bits.
struct Split {
  int per_block, count;

  // `outputs`: tiles of y. Enough blocks to give each of the ~132 processors of a large GPU `each` of them, but no block fewer than
  // `least` tiles of inputs.
  Split(int64_t outputs, int64_t tiles, int64_t each, int64_t least) {
    const int64_t wanted = std::clamp<int64_t>(132 * each / outputs, 1, std::max<int64_t>(1, tiles / least));
    per_block = int(blocks_of(tiles, wanted));
    count = int(blocks_of(tiles, per_block));
  }
};

// The decode kernel: a block has 64 outputs and `width` = 8 or 16 tokens, and four warps that take two tiles of inputs or more each.
inline Split decode_split(const QLinear& op, int width) {
  return Split(blocks_of(op.n, kTile), blocks_of(op.k, kTile), 32 / width, 8);
}

// The general kernels: a block has 128 outputs and 32, 64 or 128 tokens, and eight tiles of inputs or more.
constexpr int kGemmOutputs = 128;
inline int gemm_tokens(const QLinear& op) { return op.m <= 32 ? 32 : op.m <= 64 ? 64 : 128; }
inline int64_t gemm_blocks(const QLinear& op, int tokens) { return blocks_of(op.n, kGemmOutputs) * blocks_of(op.m, tokens); }
inline Split gemm_split(const QLinear& op, int tokens) { return Split(gemm_blocks(op, tokens), blocks_of(op.k, kTile), 1, 8); }

// The workspace begins with a counter for each tile of y, and goes on with the sums of each block, of 32 bits. Room for counters is the same for every
// op: those of a stream share the workspace, and what one leaves as sums must not be another's counters. It is enough, since blocks share
// inputs only where there are at most 132 · 4 / 2 = 264 tiles.
constexpr size_t kCounterBytes = 2048;

PackedBytes packed_bytes(const QLinear& op);
void pack(const QLinear& op, uint8_t* weight, void* scale, uint8_t* zero);
void unpack(const QLinear& op, uint8_t* weight, void* scale, uint8_t* zero);
size_t workspace_bytes(const QLinear& op);

// Where the codes of activations lie in the workspace if the op brings none, and their scales behind them: after the counters and the sums.
struct CodesPlace {
  size_t code, scale, end;
};
CodesPlace codes_place(const QLinear& op);

}  // namespace pe::mma
