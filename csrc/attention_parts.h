// How the CUDA kernel for decode attention shares out the keys, which decides what workspace it needs.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "ops.h"
#include "pack_mma.h"

namespace pe::parts {

constexpr int kHeads = 16;  // query heads of a key head that a block takes: the rows of a tensor-core instruction
constexpr int kKeys = 64;   // keys of a block's step

using mma::blocks_of;

// Blocks over the heads of one row of x.
inline int64_t head_blocks(const Attention& op) { return op.kv_heads * blocks_of(op.heads / op.kv_heads, kHeads); }

// Blocks that share the keys of a row and a head: two for each of the ~132 processors of a large GPU, as long as there are keys. It depends on
// the shape alone and not on the GPU, so that every GPU gives the same bits.
inline int64_t key_blocks(const Attention& op) {
  const int64_t length = op.cache.head_stride / op.head_dim;
  return std::clamp<int64_t>(264 / std::max<int64_t>(1, op.m * head_blocks(op)), 1, std::max<int64_t>(1, blocks_of(length, kKeys)));
}

// A block's share: sums of weighted values f32[kHeads][head_dim], then the largest score and the sum of weights of each head.
inline int64_t share_floats(const Attention& op) { return kHeads * (op.head_dim + 2); }

// The workspace begins as QLinear's does, with a counter for each row and block of heads: at most 132 where blocks share keys.
inline size_t workspace_bytes(const Attention& op) {
  const int64_t share = key_blocks(op);
  return share > 1 ? mma::kCounterBytes + size_t(op.m * head_blocks(op) * share * share_floats(op)) * 4 : 0;
}

}  // namespace pe::parts
