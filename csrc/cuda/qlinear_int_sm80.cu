// Quantized linear with INT8 or INT4 activations for any number of tokens: W8A8 and W4A8 on the INT8 tensor cores, W4A4 on the INT4 ones of
// compute capability 8.x. Sums are exact.
//
// A block has 128 outputs and 32, 64 or 128 tokens, W·Xᵀ. Codes of both come by background copies, three tiles of 64 inputs ahead, and a warp
// turns those of 32 outputs into operands in registers, for half of the tokens. One barrier a tile. With groups a block has no more than 64
// tokens: each sum is in registers twice, of the group and of all.
#include <algorithm>

#include "cuda/int_gemm.cuh"
#include "cuda/launch.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kWarps = 8, kOutputs = mma::kGemmOutputs, kBands = 2;  // bands of a warp
constexpr int kStages = 4;

// A row of x in a tile is 64 or 32 bytes. The pieces of the rows that share 128 bytes stand in turn, so that those of 8 rows which
// load_matrices() takes together lie in different banks.
template <int act>
struct Row64 {
  static constexpr int kPieces = act / 2, kShare = 8 / kPieces;
  static __device__ __forceinline__ int place(int row, int piece) { return piece ^ (row / kShare % kPieces); }
};

template <int bits, int act, int M>
struct alignas(16) Shared {
  uint4 x[kStages][M][Row64<act>::kPieces];
  uint4 code[kStages][kWarps][bits / 4][32];
};

template <int bits, int act, int M>
constexpr size_t shared_bytes() {
  return std::max(sizeof(Shared<bits, act, M>), out_bytes(M, kIntRow));
}

template <int bits, int act, int M, bool grouped>
struct Multiplier {
  static constexpr int kPieces = Row64<act>::kPieces, kTokens = M / 2, kColumns = kTokens / 8, kSums = kBands * kColumns * 4;

  const QLinear& op;
  const Shares& shares;
  Shared<bits, act, M>& shared;
  int warp, lane, token0;
  int sum[kSums] = {};
  float total[grouped ? kSums : 1] = {};
  float2 scale[grouped ? kBands : 1];  // of the group of the next tile

  __device__ Multiplier(const QLinear& op, const Shares& shares, Shared<bits, act, M>& shared) : op(op), shares(shares), shared(shared) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, token0 = warp / 4 * kTokens;
  }

  // Of all of the block's inputs.
  __device__ auto& sums() {
    if constexpr (grouped)
      return total;
    else
      return sum;
  }

  __device__ void copy_codes(int tile) {
    const uint4* from = codes_of<bits>(op, shares, warp, tile) + lane;
    for (int i = 0; i < bits / 4; ++i) ptx::copy_async(ptx::shared(&shared.code[tile % kStages][warp][i][lane]), from + i * 32);
  }

  __device__ void fetch_scales(int tile) {
    if constexpr (grouped)
      for (int band = 0; band < kBands; ++band) scale[band] = group_scales(op, shares, warp % 4 * kBands + band, tile);
  }
  __device__ void end_tile(int tile, int end) {
    if constexpr (grouped) {
      if (!ends_group(shares, tile) && tile + 1 < end) return;
      for (int band = 0; band < kBands; ++band) add_group<kColumns * 4>(sum + band * kColumns * 4, total + band * kColumns * 4, scale[band]);
      fetch_scales(tile + 1);
    }
  }

  // A row beyond the last token repeats that one, and is not stored; pieces beyond the last input are zeros.
  __device__ void copy_x(int tile) {
    const int64_t row_bytes = op.k * act / 8;
    for (int i = threadIdx.x; i < M * kPieces; i += kWarps * 32) {
      const int row = i / kPieces, piece = i % kPieces;
      const int64_t at = int64_t(tile) * kPieces * 16 + piece * 16;
      const char* from = static_cast<const char*>(op.x_code) + min(int64_t(blockIdx.y) * M + row, op.m - 1) * row_bytes + at;
      ptx::copy_async(ptx::shared(&shared.x[tile % kStages][row][Row64<act>::place(row, piece)]), from, at < row_bytes ? 16 : 0);
    }
  }

  __device__ void multiply(int tile) {
    const auto& x = shared.x[tile % kStages];
    uint32_t a[kBands][act == 8 ? 2 : 1][4];
    for (int band = 0; band < kBands; ++band) {
      const uint4* code = shared.code[tile % kStages][warp % 4 * kBands + band][0];
      if constexpr (act == 8)
        int8_rows<bits>(code, lane, a[band]);
      else
        int4_rows(code, lane, a[band][0]);
    }
#pragma unroll
    for (int step = 0; step < (act == 8 ? 2 : 1); ++step)
#pragma unroll
      for (int j = 0; j < kColumns; j += 2) {
        // 16 tokens by two pieces, 32 inputs of 8 bits or 64 of 4.
        const int row = token0 + j * 8 + lane / 16 * 8 + lane % 8;
        uint32_t b[4];
        ptx::load_matrices(b, ptx::shared(&x[row][Row64<act>::place(row, step * 2 + lane / 8 % 2)]));
        for (int band = 0; band < kBands; ++band)
          for (int i = 0; i < 2; ++i) {
            int(&d)[4] = *reinterpret_cast<int(*)[4]>(sum + (band * kColumns + j + i) * 4);
            if constexpr (act == 8)
              ptx::mma_int8(d, a[band][step], b[2 * i], b[2 * i + 1]);
            else
              ptx::mma_int4(d, a[band][step], b[2 * i], b[2 * i + 1]);
          }
      }
  }
};

template <int bits, int act, int M, bool grouped>
__global__ void __launch_bounds__(kWarps * 32, M == 128 || grouped ? 1 : 2)
qlinear_int_kernel(const __grid_constant__ QLinear op, const __grid_constant__ Shares shares) {
  extern __shared__ __align__(16) unsigned char memory[];
  const int begin = blockIdx.z * shares.per_block, end = min(begin + shares.per_block, shares.tiles);
  ptx::dependency_release();
  Multiplier<bits, act, M, grouped> product(op, shares, *reinterpret_cast<Shared<bits, act, M>*>(memory));
  for (int tile = begin; tile < min(begin + kStages - 1, end); ++tile) product.copy_codes(tile);
  product.fetch_scales(begin);
  ptx::dependency_wait();  // weights are nobody's output, x is
  for (int tile = begin; tile < begin + kStages - 1; ++tile) {
    if (tile < end) product.copy_x(tile);
    ptx::copy_commit();
  }
  for (int tile = begin; tile < end; ++tile) {
    ptx::copy_wait<kStages - 2>();
    __syncthreads();  // this tile is there, and nobody reads the one before any more
    if (tile + kStages - 1 < end) product.copy_codes(tile + kStages - 1), product.copy_x(tile + kStages - 1);
    ptx::copy_commit();
    product.multiply(tile);
    product.end_tile(tile, end);
  }
  ptx::copy_wait<0>();
  auto& sums = product.sums();
  if (gridDim.z > 1 && !add_other_sums(shares, kWarps * 32, sums)) return;
  __syncthreads();  // shared memory becomes room for y
  float* out = reinterpret_cast<float*>(memory);
  const int output = product.warp % 4 * kBands * mma::kBand + product.lane / 4, token = product.token0 + product.lane % 4 * 2;
  for (int band = 0; band < kBands; ++band)
    for (int j = 0; j < product.kColumns; ++j)
      put_sums(sums + (band * product.kColumns + j) * 4, out, token + j * 8, output + band * mma::kBand);
  __syncthreads();
  store_sums<grouped>(op, out, M, bits == 4 && act == 8 ? kTimes : 1);
}

const char* refuses(const QLinear& op) {
  if (const char* why = refuses_int(op)) return why;
  if (op.act_bits == 4 && compute_capability() >= 90) return "multiplies INT4 on compute capability 8.x, whose tensor cores know it";
  return nullptr;
}

template <int bits, int act, int M, bool grouped>
void start(const QLinear& op, void* stream) {
  const mma::Split split = mma::gemm_split(op, M);
  const dim3 grid(unsigned(mma::blocks_of(op.n, kOutputs)), unsigned(mma::blocks_of(op.m, M)), unsigned(split.count));
  launch(qlinear_int_kernel<bits, act, M, grouped>, grid, dim3(kWarps * 32), shared_bytes<bits, act, M>(), stream, op,
         shares_of(op, split));
}

void run(const QLinear& asked, void* stream) {
  if (asked.m == 0) return;
  const QLinear op = with_codes(asked, stream);
  auto of_types = [&]<int bits, int act>() {
    if (op.group < op.k) return op.m <= 32 ? start<bits, act, 32, true>(op, stream) : start<bits, act, 64, true>(op, stream);
    switch (mma::gemm_tokens(op)) {
      case 32: return start<bits, act, 32, false>(op, stream);
      case 64: return start<bits, act, 64, false>(op, stream);
      default: return start<bits, act, 128, false>(op, stream);
    }
  };
  if (op.bits == 8)
    of_types.template operator()<8, 8>();
  else
    op.act_bits == 8 ? of_types.template operator()<4, 8>() : of_types.template operator()<4, 4>();
}

const Row<QLinear> row{{"qlinear_int_sm80", Device::cuda, Arch::sm80, 4, Layout::mma, refuses, run}};

}  // namespace
}  // namespace pe
