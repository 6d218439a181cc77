// Quantized linear for 1 to 16 tokens: INT4 or INT8 weights of layout mma, f16 or bf16 activations, FP16 outliers and columns.
//
// At this size the weights' way from memory is all that counts. A block has 64 outputs and a part of the inputs. Its first four warps
// take the tiles of 64 inputs in turn: each copies them to its own ring in shared memory, several ahead, turns the codes into integers
// in registers and multiplies with those as the row operand, W·Xᵀ, so the tokens are the short side of the tensor core's tile. Products
// and sums of a group are exact or f32; the scale comes last, one FMA for each sum. No warp waits for another before the end.
//
// The other two warps do the outliers meanwhile. Sixteen entries of 16 outputs are one tensor-core instruction: column j of its row
// operand is entry j's value in the entry's row, row j of the other operand is x at the entry's input. So rows of any skew cost what
// their entries cost, nothing is added atomically, and products are exact: a bf16 kernel splits a value into two bf16 parts. Whole columns
// are the same with values in all rows; the blocks that share outputs take their steps of 16 in turn.
//
// At the end the warps' sums are added in a fixed order; so are those of the blocks that share outputs, by the last of them to come.
#include "cuda/columns.cuh"
#include "cuda/dequant.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout_mma.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kTileWarps = 4, kOutlierWarps = 2;
// Three tiles of 2 KiB under way for each of ~12 warps of a processor: 72 KiB, where 4.3 TB/s · 0.7 µs need 23. INT8 for 16 tokens has two
// of 4 KiB, for two blocks to a processor of 227 KiB, and for one to have room in the 99 KiB of compute capability 8.6 and 8.9.
template <int bits, int W>
constexpr int kStages = bits * W == 16 ? 3 : 4;
constexpr int kBands = mma::kTile / mma::kBand;

// A warp's tile of 64 outputs × 64 inputs in shared memory. W: tokens / 8.
template <int bits, int W>
struct alignas(16) Stage {
  uint4 weight[kBands][bits / 4][32];
  uint4 x[2][W][32];        // [half of the inputs][tokens][lane]: the 8 inputs of ops.h that the lane multiplies, two steps' worth
  uint4 scale[2][16];       // [group]: of outputs g and g+8 of each band, 8 f16 or f32 for each g. A tile has one group, or two of 32
  uint2 zero[2][8];         // [group][g]: as scale, u8
};

// A warp's sums as mma() leaves them: a lane has two outputs of two tokens.
template <int W>
using Sums = float4[kBands][W][32];

template <int bits, int W>
struct Shared {
  union {  // a warp that takes tiles has sums when it has done with its ring
    Stage<bits, W> stage[kStages<bits, W>];
    Sums<W> sum;
  } ring[kTileWarps];
  Sums<W> outlier_sum[kOutlierWarps];

  __device__ Sums<W>& sum(int warp) { return warp < kTileWarps ? ring[warp].sum : outlier_sum[warp - kTileWarps]; }
};

// What a lane of a block works on.
struct Part {
  const QLinear& op;
  const Shares& shares;
  int tiles, begin, end;  // tiles of inputs in a row; those of this block
  int lane, g, t;
  __device__ Part(const QLinear& op, const Shares& shares) : op(op), shares(shares), tiles(shares.tiles) {
    begin = blockIdx.y * shares.per_block, end = min(begin + shares.per_block, tiles);
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  }
};

// The row of x that a lane multiplies as token w·8 + g. Where there is no such token it is row 0: whatever stands in a column of the
// tensor core's operand reaches that column of the result alone, which nobody stores.
template <class T>
__device__ const T* token_row(const Part& part, int w) {
  const int token = w * 8 + part.g;
  return reinterpret_cast<const T*>(part.op.x) + (token < part.op.m ? token * part.op.x_stride : 0);
}

template <class T, int bits, int W>
struct TileWarp {
  using Ring = Stage<bits, W>;
  static constexpr int kPieces = kBands * bits / 4;  // of 16 bytes, a lane's share of a tile

  const Part& part;
  const QLinear& op;
  const Ring* ring;
  uint32_t ring_lane;      // shared address of the lane's first piece
  const uint4* weight;
  const T* x[W];
  // The lane's 16 bytes of a group's scales, 128 or as f32 256 bytes, or zeros, 64 bytes, of one of a tile's two groups. Of f32 a lane
  // has that of both: they would be the work of 32 lanes, and leave none for the zeros.
  const char* side = nullptr;
  int side_bytes = 0, side_group = 0;
  uint32_t side_to = 0;
  float sum[kBands][W][4] = {}, total[kBands][W][4] = {};  // of a group; of all, with scales

  __device__ TileWarp(const Part& part, Ring* ring) : part(part), op(part.op), ring(ring) {
    ring_lane = ptx::shared(&ring->weight[0][0][part.lane]);
    weight = reinterpret_cast<const uint4*>(op.weight) + size_t(blockIdx.x) * part.tiles * (kPieces * 32) + part.lane;
    for (int w = 0; w < W; ++w) x[w] = token_row<T>(part, w) + part.t * 8;
    const size_t group = size_t(blockIdx.x) * part.shares.groups;
    if (part.lane < 16) {
      side_bytes = op.scale_f32 ? 256 : 128, side_group = part.lane * 16 / side_bytes;
      side_to = ptx::shared(&ring->scale[0][0]) + part.lane % (side_bytes / 16) * 16 + side_group * sizeof(ring->scale[0]);
      side = static_cast<const char*>(op.scale) + group * side_bytes + part.lane % (side_bytes / 16) * 16;
    } else if (part.lane < 24 && op.zero) {
      side_bytes = 64, side_group = part.lane / 4 % 2, side_to = ptx::shared(&ring->zero[side_group][part.lane % 4 * 2]);
      side = reinterpret_cast<const char*>(op.zero) + group * 64 + part.lane % 4 * 16;
    }
  }

  __device__ void copy_weights(int tile, int stage) const {
    const uint4* from = weight + int64_t(tile) * (kPieces * 32);
    for (int i = 0; i < kPieces; ++i) ptx::copy_async(ring_lane + stage * sizeof(Ring) + i * 512, from + i * 32);
    const int group = tile * mma::kTile >> part.shares.group_shift, last = part.shares.groups - 1;
    const uint32_t to = side_to + stage * sizeof(Ring);
    if (side_bytes) ptx::copy_async(to, side + int64_t(min(group + side_group, last)) * side_bytes);
    if (op.scale_f32 && part.lane < 16) ptx::copy_async(to + sizeof(ring->scale[0]), side + int64_t(min(group + 1, last)) * side_bytes);
  }

  __device__ void copy_x(int tile, int stage) const {
    for (int half = 0; half < 2; ++half) {
      const int c = tile * mma::kTile + half * 32, inside = min(max(int(op.k) - c - part.t * 8, 0), 8);
      for (int w = 0; w < W; ++w)
        ptx::copy_async(ring_lane + stage * sizeof(Ring) + offsetof(Ring, x) + (half * W + w) * 512, x[w] + c, inside * 2);
    }
  }

  __device__ void multiply(const Ring& from) {
    const bool halves = part.shares.group_shift == 5;  // groups of 32: each half of the tile has scales of its own
    uint32_t zero[2] = {0x80808080u >> (bits == 4 ? 4 : 0), 0x80808080u >> (bits == 4 ? 4 : 0)};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int which = halves ? half : 0;
      if (op.zero) *reinterpret_cast<uint2*>(zero) = from.zero[which][part.g];
      uint4 x[W];
      for (int w = 0; w < W; ++w) x[w] = from.x[half][w][part.lane];
#pragma unroll
      for (int band = 0; band < kBands; ++band) {
        const Dequant<T, bits> dequant(zero[band / 2] >> (band % 2 * 16));
        const uint4 piece = from.weight[band][bits == 8 ? half : 0][part.lane];
        const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
        for (int i = 0; i < 2; ++i) {
          uint32_t a[4];
          dequant(word + (bits == 8 ? 2 * i : 2 * half + i), a);
          for (int w = 0; w < W; ++w) ptx::mma(T(), sum[band][w], a, i ? x[w].z : x[w].x, i ? x[w].w : x[w].y);
        }
      }
      if (half == 0 && !halves) continue;
      add_scaled(from.scale[which]);
    }
  }

  // Adds the sums of a group, times the scales.
  __device__ void add_scaled(const uint4* from) {
    float scale[kBands * 2];
    if (op.scale_f32) {
      for (int i = 0; i < 2; ++i) *reinterpret_cast<uint4*>(scale + 4 * i) = from[part.g * 2 + i];
    } else {
      load8(reinterpret_cast<const __half*>(from + part.g), scale);
    }
    for (int band = 0; band < kBands; ++band)
      for (int w = 0; w < W; ++w)
        for (int i = 0; i < 4; ++i) total[band][w][i] += sum[band][w][i] * scale[2 * band + i / 2], sum[band][w][i] = 0;
  }

  __device__ void run(int warp, Sums<W>& out) {
    constexpr int kStages = pe::kStages<bits, W>;
    const int first = part.begin + warp, count = first < part.end ? (part.end - first + kTileWarps - 1) / kTileWarps : 0;
    auto tile = [&](int i) { return first + i * kTileWarps; };
    for (int i = 0; i < kStages - 1; ++i)
      if (i < count) copy_weights(tile(i), i);
    ptx::dependency_wait();  // weights are nobody's output, x is
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) copy_x(tile(i), i);
      ptx::copy_commit();
    }
    for (int i = 0; i < count; ++i) {
      ptx::copy_wait<kStages - 2>();
      __syncwarp();  // the other lanes' copies are there, and nobody still reads the stage that is filled next
      const int next = i + kStages - 1;
      if (next < count) copy_weights(tile(next), next % kStages), copy_x(tile(next), next % kStages);
      ptx::copy_commit();
      multiply(ring[i % kStages]);
    }
    ptx::copy_wait<0>();
    __syncwarp();  // the sums lie where other lanes may still read a tile
    for (int band = 0; band < kBands; ++band)
      for (int w = 0; w < W; ++w) {
        const float(&v)[4] = total[band][w];
        out[band][w][part.lane] = {v[0], v[1], v[2], v[3]};
      }
  }
};

template <class T, int W>
struct OutlierWarp {
  const Part& part;
  const QLinear& op;

  __device__ OutlierWarp(const Part& part) : part(part), op(part.op) {}

  // Entries from … of a band between two tiles of inputs.
  struct Range {
    uint32_t from, to;
  };
  __device__ Range range(int band, int tile, int end) const {
    const uint32_t* offset = op.outlier_offset + (size_t(blockIdx.x) * kBands + band) * part.tiles;
    return {offset[tile], offset[end]};
  }

  // Sixteen entries, four a lane, from entry `at` on. Unless they are `whole`, some lie outside of the range and count nothing.
  // x: the lane's tokens at the input that an entry's 0 means.
  template <bool whole>
  __device__ void add(uint32_t at, Range range, const uint16_t* const (&x)[W], float (&sum)[W][4]) const {
    at += part.t * 4;
    uint4 four = {};
    if (whole || at < range.to) four = *reinterpret_cast<const uint4*>(op.outlier_entry + at);
    uint32_t entry[4] = {four.x, four.y, four.z, four.w};
    uint32_t b[W][4];
    for (int i = 0; i < 4; ++i) {
      const bool inside = whole || (at + i >= range.from && at + i < range.to);
      for (int w = 0; w < W; ++w) b[w][i] = inside ? x[w][entry[i] & (mma::kSpan - 1)] : 0;
    }
    uint32_t value[2], here[2], high[2];  // for a pair of entries, in the halves of a word
    for (int pair = 0; pair < 2; ++pair) {
      value[pair] = __byte_perm(entry[2 * pair], entry[2 * pair + 1], 0x7632);
      const uint32_t places = __byte_perm(entry[2 * pair], entry[2 * pair + 1], 0x5410);
      // All bits of a half where the row is g or g+8, since 0x8000 − 0 alone has the topmost bit; and where it is the latter.
      here[pair] = ptx::half_signs(0x80008000u - ((places >> 12 & 0x00070007u) ^ part.g * 0x00010001u));
      high[pair] = ptx::half_signs(places);
    }
    for (int p = 0; p < kParts<T>; ++p) {
      uint32_t a[4];
      for (int pair = 0; pair < 2; ++pair) {
        const uint32_t v = value_part<T>(value[pair], p);
        a[2 * pair] = v & here[pair] & ~high[pair], a[2 * pair + 1] = v & here[pair] & high[pair];
      }
      for (int w = 0; w < W; ++w) ptx::mma(T(), sum[w], a, b[w][0] | b[w][1] << 16, b[w][2] | b[w][3] << 16);
    }
  }

  // The 16 columns from `column` on.
  __device__ void add_step(int band, int64_t column, float (&sum)[W][4]) const {
    uint32_t a[kParts<T>][4], b[W][2] = {};
    column_values<T>(op, int64_t(blockIdx.x) * mma::kTile + band * mma::kBand, column, a);
    for (int i = 0; i < 4; ++i) {
      const int64_t at = column + i / 2 * 8 + part.t * 2 + i % 2;
      if (at >= op.columns) continue;
      const int input = op.column_index[at];
      for (int w = 0; w < W; ++w) b[w][i / 2] |= uint32_t(reinterpret_cast<const uint16_t*>(token_row<T>(part, w))[input]) << (i % 2 * 16);
    }
    for (int p = 0; p < kParts<T>; ++p)
      for (int w = 0; w < W; ++w) ptx::mma(T(), sum[w], a[p], b[w][0], b[w][1]);
  }

  __device__ void run(int warp, Sums<W>& out) const {
    const int bands = op.outlier_entry ? kBands : 0;  // that have outliers
    for (int band = 0; band < bands; ++band) {  // on their way to L2 before x is there
      const Range all = range(band, part.begin, part.end);
      for (uint32_t at = all.from + part.lane * 32; at < all.to; at += 32 * 32) ptx::prefetch(op.outlier_entry + at);
    }
    ptx::dependency_wait();
    for (int band = 0; band < kBands; ++band) {
      float sum[W][4] = {};
      constexpr int kSpanTiles = mma::kSpan / mma::kTile;
      for (int tile = part.begin, next; band < bands && tile < part.end; tile = next) {
        next = min(part.end, (tile / kSpanTiles + 1) * kSpanTiles);
        const Range entries = range(band, tile, next);
        const uint16_t* x[W];
        for (int w = 0; w < W; ++w)
          x[w] = reinterpret_cast<const uint16_t*>(token_row<T>(part, w)) + tile / kSpanTiles * mma::kSpan;
        // The warps begin with another one in every second band, so that what is left over after full rounds falls on both.
        const uint32_t begin = (entries.from & ~3u) + (warp + band) % kOutlierWarps * 16;
        uint32_t at = begin;
        if (at < entries.from && at < entries.to) add<false>(at, entries, x, sum), at += kOutlierWarps * 16;
#pragma unroll 2
        for (; at + 16 <= entries.to; at += kOutlierWarps * 16) add<true>(at, entries, x, sum);
        if (at < entries.to) add<false>(at, entries, x, sum);
      }
#pragma unroll 1
      for (int64_t step = blockIdx.y * kOutlierWarps + warp; step * kColumnStep < op.columns; step += gridDim.y * kOutlierWarps)
        add_step(band, step * kColumnStep, sum);
      for (int w = 0; w < W; ++w) out[band][w][part.lane] = {sum[w][0], sum[w][1], sum[w][2], sum[w][3]};
    }
  }
};

// Adds what the other blocks of these outputs have found; false in all of them but the last to come.
template <int W>
__device__ bool add_other_blocks(const Part& part, int band, float4 (&sum)[W]) {
  auto place = [&](int block, int w) {
    return part.shares.sums + (((size_t(blockIdx.x) * gridDim.y + block) * kBands + band) * W + w) * 32 + part.lane;
  };
  if (band < kBands)
    for (int w = 0; w < W; ++w) *place(blockIdx.y, w) = sum[w];
  if (!last_to_come(part.shares.counter + blockIdx.x, gridDim.y) || band >= kBands) return false;
  for (int w = 0; w < W; ++w) {
    sum[w] = {};
    for (int block = 0; block < int(gridDim.y); ++block) add_to(sum[w], __ldcg(place(block, w)));
  }
  return true;
}

template <class T>
__device__ void finish(const QLinear& op, int64_t token, int64_t output, float v) {
  if (token >= op.m || output >= op.n) return;
  if (op.bias) v += op.bias[output];
  const size_t at = token * op.y_stride + output;
  if (op.residual) v += float(reinterpret_cast<const T*>(op.residual)[at]);
  reinterpret_cast<T*>(op.y)[at] = T(v);
}

template <class T, int bits, int W>
__global__ void __launch_bounds__((kTileWarps + kOutlierWarps) * 32, W == 1 ? 3 : 2)
qlinear_decode_kernel(const __grid_constant__ QLinear op, const __grid_constant__ Shares shares) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<bits, W>*>(memory);
  const Part part(op, shares);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  ptx::dependency_release();
  if (warp < kTileWarps)
    TileWarp<T, bits, W>(part, shared.ring[warp].stage).run(warp, shared.sum(warp));
  else
    OutlierWarp<T, W>(part).run(warp - kTileWarps, shared.sum(warp));
  __syncthreads();
  const int band = warp;  // of this warp from here on; the outliers' warps have none
  float4 sum[W] = {};
  if (band < kBands)
    for (int w = 0; w < W; ++w)
      for (int from = 0; from < warps; ++from) add_to(sum[w], shared.sum(from)[band][w][part.lane]);
  if (gridDim.y > 1 && !add_other_blocks<W>(part, band, sum)) return;
  if (band >= kBands) return;
  const int64_t output = int64_t(blockIdx.x) * mma::kTile + band * mma::kBand + part.g;
  for (int w = 0; w < W; ++w) {
    const int token = w * 8 + part.t * 2;
    finish<T>(op, token, output, sum[w].x), finish<T>(op, token + 1, output, sum[w].y);
    finish<T>(op, token, output + 8, sum[w].z), finish<T>(op, token + 1, output + 8, sum[w].w);
  }
}

const char* refuses(const QLinear& op) {
  if (op.m > 16) return "takes up to 16 tokens";
  return refuses_mma(op);
}

template <class T, int bits, int W>
void start(const QLinear& op, void* stream) {
  const mma::Split split = mma::decode_split(op, W * 8);
  const dim3 grid(unsigned(mma::blocks_of(op.n, mma::kTile)), unsigned(split.count));
  const Shares shares = shares_of(op, split);
  const int warps = kTileWarps + (op.outlier_entry || op.columns ? kOutlierWarps : 0);
  launch(qlinear_decode_kernel<T, bits, W>, grid, dim3(warps * 32), sizeof(Shared<bits, W>), stream, op, shares);
}

void run(const QLinear& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    if (op.bits == 4)
      op.m <= 8 ? start<T, 4, 1>(op, stream) : start<T, 4, 2>(op, stream);
    else
      op.m <= 8 ? start<T, 8, 1>(op, stream) : start<T, 8, 2>(op, stream);
  });
}

const Row<QLinear> row{{"qlinear_decode_sm80", Device::cuda, Arch::sm80, 2, Layout::mma, refuses, run}};

}  // namespace
}  // namespace pe
