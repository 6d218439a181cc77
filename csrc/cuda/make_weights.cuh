// Codes of layout mma → weights in shared memory for the general kernels: scale · (code − zero) in the activations' type, rounded once, with
// the outliers written over them. A warp makes the 16 rows of a band, 64 inputs at a time.
//
// Rows of 128 bytes are swizzled as the tensor cores of Hopper want them: the 16-byte piece c of row r lies at place c ^ r%8.
#pragma once

#include "cuda/dequant.cuh"
#include "cuda/layout_mma.cuh"

namespace pe {

__device__ __forceinline__ int swizzle(int row, int piece) { return piece ^ (row & 7); }

// The tile of 64 outputs that one of a block's eight bands belongs to. Of 128 outputs the last 64 may lie beyond n: then the tile before
// is made twice, and its second result not stored.
__device__ __forceinline__ int row_tile(const QLinear& op, int band) { return min(int(blockIdx.x * 2 + band / 4), int((op.n - 1) / mma::kTile)); }

// The codes of one of a block's eight bands, from a tile of inputs on.
template <int bits>
__device__ __forceinline__ const uint4* codes_of(const QLinear& op, const Shares& shares, int band, int tile) {
  return reinterpret_cast<const uint4*>(op.weight) + ((size_t(row_tile(op, band)) * shares.tiles + tile) * 4 + band % 4) * (bits / 4 * 32);
}

// Scales, zeros and outliers are fetched a tile or more before their use.
template <class T, int bits>
struct Maker {
  const QLinear& op;
  const Shares& shares;
  int lane, g, end;
  int place;                // byte of the lane's first piece
  size_t group_base;        // of scales and zeros: the first group of the lane's outputs g and g+8
  const uint32_t* offset;   // of the band's tiles of outliers
  uint2 scale[2];           // of outputs g and g+8, f32 or two f16 in x; of the next tile's halves, in the order in which the lane takes them
  uint32_t zero[2];
  uint32_t first, last, after;  // outliers of the next tile begin and end; those of the tile after it end
  uint32_t entry = 0;           // of the next tile, the lane's

  __device__ Maker(const QLinear& op, const Shares& shares, int band, int begin, int end) : op(op), shares(shares), end(end) {
    lane = threadIdx.x % 32, g = lane / 4;
    place = g * 128 + swizzle(g, (g & 1) * 4 + lane % 4) * 16;
    const size_t tile = row_tile(op, band);
    group_base = tile * shares.groups * mma::kTile + g * 8 + band % 4 * 2;
    offset = op.outlier_offset + (tile * 4 + band % 4) * shares.tiles;
    fetch_groups(begin);
    if (op.outlier_entry) {
      first = offset[begin], last = offset[begin + 1], after = offset[min(begin + 2, end)];
      fetch_entry();
    }
  }

  __device__ void fetch_groups(int tile) {
    for (int i = 0; i < 2; ++i) {
      const int group = (tile * mma::kTile + (i ^ (g & 1)) * 32) >> shares.group_shift;
      const size_t at = group_base + size_t(min(group, shares.groups - 1)) * mma::kTile;
      if (op.scale_f32)
        scale[i] = *reinterpret_cast<const uint2*>(static_cast<const float*>(op.scale) + at);
      else
        scale[i].x = *reinterpret_cast<const uint32_t*>(static_cast<const __half*>(op.scale) + at);
      zero[i] = op.zero ? *reinterpret_cast<const uint16_t*>(op.zero + at) : (1 << (bits - 1)) * 0x101;
    }
  }

  __device__ void fetch_entry() { entry = first + lane < last ? op.outlier_entry[first + lane] : 0; }

  __device__ void place_outlier(char* rows, uint32_t e) const {
    const int row = e >> 12 & 15, c = e % mma::kTile;
    *reinterpret_cast<T*>(rows + row * 128 + swizzle(row, c / 8) * 16 + c % 8 * 2) = outlier_value<T>(e);
  }

  // Makes a tile's weights in the band's 16 `rows`, and fetches what the next tile needs. `code`: the band's pieces.
  __device__ void make(int tile, const uint4* code, char* rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Lanes of odd rows take the second half first: else the four pieces of two rows that are written together would share banks.
      const int half = i ^ (g & 1);
      alignas(16) uint32_t word[bits / 2];
      uint32_t step[2][4];
      if constexpr (bits == 4)
        *reinterpret_cast<uint2*>(word) = reinterpret_cast<const uint2*>(code + lane)[half];
      else
        *reinterpret_cast<uint4*>(word) = code[half * 32 + lane];
      const Dequant<T, bits> dequant(zero[i]);
      for (int j = 0; j < 2; ++j) dequant(word + j * (bits / 4), step[j]);
      const auto store = [&](auto&& scaled) {
        for (int high = 0; high < 2; ++high)
          *reinterpret_cast<uint4*>(rows + (place ^ i * 64) + high * 1024) =
              make_uint4(scaled(step[0][high], high), scaled(step[0][2 + high], high), scaled(step[1][high], high), scaled(step[1][2 + high], high));
      };
      const __half2 halves = pair_of<__half2>(scale[i].x);
      if (op.scale_f32)
        store([&](uint32_t pair, int high) { return times<T>(pair, __uint_as_float(high ? scale[i].y : scale[i].x)); });
      else if constexpr (std::is_same_v<T, __half>)
        store([&](uint32_t pair, int high) { return times(pair, high ? __high2half(halves) : __low2half(halves)); });
      else
        store([&](uint32_t pair, int high) { return times<T>(pair, high ? __high2float(halves) : __low2float(halves)); });
    }
    if (op.outlier_entry) {
      __syncwarp();  // the weights that they replace are there
      if (first + lane < last) place_outlier(rows, entry);
#pragma unroll 1
      for (uint32_t at = first + 32 + lane; at < last; at += 32) place_outlier(rows, op.outlier_entry[at]);
      first = last, last = after;
      fetch_entry();
      after = offset[min(tile + 3, end)];
    }
    if (tile + 1 < end) fetch_groups(tile + 1);
  }
};

}  // namespace pe
