// Quantized linear for any number of tokens: INT4 or INT8 weights of layout mma, f16 or bf16 activations, FP16 outliers and
// columns.
//
// A block has 128 outputs and 32, 64 or 128 tokens. For each tile of 64 inputs every warp turns the codes of 16 outputs into weights in
// shared memory, scale and all, and writes its outliers over them, so that they cost nothing in the product. Meanwhile the tile before
// is multiplied from the other of two buffers, X·Wᵀ. Codes and x come by background copies, two tiles ahead of their use; a lane copies
// the very codes that it will read, so these need no barrier, and there is one barrier a tile.
//
// Rows of 128 bytes in shared memory are swizzled, so that 8 rows' pieces of one column lie in different banks.
#include <algorithm>

#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout_mma.cuh"
#include "cuda/make_weights.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kWarps = 8, kOutputs = mma::kGemmOutputs;
constexpr int kStages = 4;  // one tile is multiplied, one turned into weights, two are on their way
constexpr int kOutRow = kOutputs + 8;  // f32 of a row of y on its way out; 8 more put rows of a quarter warp into different banks
static_assert(kWarps * mma::kBand == kOutputs);

template <int bits, int M>
struct alignas(16) Shared {
  uint4 w[2][kOutputs][8];
  uint4 x[kStages][M][8];
  uint4 code[kStages][kWarps][bits / 4][32];
};

template <int bits, int M>
constexpr size_t shared_bytes() {
  return std::max(sizeof(Shared<bits, M>), out_bytes(M, kOutRow));
}

// The warp's codes of a tile, in the order of the tiles. A pointer that moves with them stays in a register; one computed from the tile
// the compiler computes at every tile from the beginning, 64 bits wide.
template <int bits>
struct Codes {
  uint32_t to;
  const uint4* from;

  template <class Shared>
  __device__ Codes(const QLinear& op, const Shares& shares, Shared& shared, int warp, int begin) {
    const int lane = threadIdx.x % 32;
    to = ptx::shared(&shared.code[0][warp][0][lane]);
    from = codes_of<bits>(op, shares, warp, begin) + lane;
  }
  __device__ void copy(unsigned tile) {
    for (int i = 0; i < bits / 4; ++i) ptx::copy_async(to + tile % kStages * (kWarps * bits / 4 * 512) + i * 512, from + i * 32);
    from += 4 * bits / 4 * 32;
  }
};

// A warp's share of the product: half of the tokens by a quarter of the outputs.
template <class T, int bits, int M>
struct Multiplier {
  static constexpr int kRows = M / 2 / 16, kColumns = kOutputs / 4 / 8;  // in tiles of an instruction
  static constexpr int kCopies = M * 8 / (kWarps * 32);  // of 16 bytes of a tile of x, a thread's

  const QLinear& op;
  Shared<bits, M>& shared;
  int lane, token0, output0;
  uint32_t a_row, a_piece, b_row, b_piece;  // shared addresses of the lane's first row of x and w; bytes of its first piece within
  const T* x[kCopies];                      // of the tile to be copied next
  uint32_t x_to;
  float sum[kRows][kColumns][4] = {};

  __device__ Multiplier(const QLinear& op, Shared<bits, M>& shared, int begin) : op(op), shared(shared) {
    const int warp = threadIdx.x / 32;
    lane = threadIdx.x % 32, token0 = warp / 4 * (M / 2), output0 = warp % 4 * (kOutputs / 4);
    const int a = token0 + lane % 16, b = output0 + lane / 16 * 8 + lane % 8;
    a_row = ptx::shared(&shared.x[0][a]), a_piece = swizzle(a, lane / 16) * 16;
    b_row = ptx::shared(&shared.w[0][b]), b_piece = swizzle(b, lane / 8 % 2) * 16;
    // All of x's rows by all threads; a row beyond the last token repeats that one, and is not stored.
    const int row = threadIdx.x / 8, piece = threadIdx.x % 8;
    for (int i = 0; i < kCopies; ++i)
      x[i] = reinterpret_cast<const T*>(op.x) + min(int64_t(blockIdx.y) * M + i * kWarps * 4 + row, op.m - 1) * op.x_stride +
             begin * mma::kTile + piece * 8;
    x_to = ptx::shared(&shared.x[0][row][swizzle(row, piece)]);
  }

  __device__ void copy_x(unsigned tile) {
    const int left = int(op.k) - int(tile * mma::kTile);  // inputs, before the padding
    const uint32_t to = x_to + tile % kStages * sizeof(shared.x[0]);
    for (int i = 0; i < kCopies; ++i) {
      if (left >= mma::kTile)
        ptx::copy_async(to + i * kWarps * 4 * 128, x[i]);
      else
        ptx::copy_async(to + i * kWarps * 4 * 128, x[i], min(max(left - int(threadIdx.x) % 8 * 8, 0), 8) * 2);
      x[i] += mma::kTile;
    }
  }

  __device__ void multiply(unsigned tile) {
    const uint32_t x_at = a_row + tile % kStages * sizeof(shared.x[0]), w_at = b_row + (tile & 1) * sizeof(shared.w[0]);
#pragma unroll
    for (int step = 0; step < 4; ++step) {
      uint32_t a[kRows][4], b[kColumns / 2][4];
      for (int i = 0; i < kRows; ++i) ptx::load_matrices(a[i], x_at + (a_piece ^ step * 32) + i * 16 * 128);
      for (int j = 0; j < kColumns / 2; ++j) ptx::load_matrices(b[j], w_at + (b_piece ^ step * 32) + j * 16 * 128);
      for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kColumns; ++j) ptx::mma(T(), sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  // Adds what the other blocks of this tile of y have found; false in all of them but the last to come.
  __device__ bool add_other_blocks(const Shares& shares) {
    const unsigned tile = blockIdx.y * gridDim.x + blockIdx.x;
    auto place = [&](int block, int i) {
      return shares.sums + ((size_t(tile) * gridDim.z + block) * (kRows * kColumns) + i) * (kWarps * 32) + threadIdx.x;
    };
    for (int i = 0; i < kRows * kColumns; ++i) {
      const float(&v)[4] = sum[i / kColumns][i % kColumns];
      *place(blockIdx.z, i) = {v[0], v[1], v[2], v[3]};
    }
    if (!last_to_come(shares.counter + tile, gridDim.z)) return false;
#pragma unroll 1
    for (int block = 0; block < int(gridDim.z); ++block)
#pragma unroll
      for (int i = 0; i < kRows * kColumns; ++i) {
        const float4 other = __ldcg(place(block, i));
        float(&v)[4] = sum[i / kColumns][i % kColumns];
        if (block == 0) v[0] = v[1] = v[2] = v[3] = 0;
        v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
      }
    return true;
  }

  // Through shared memory, so that a warp stores whole rows: in its registers it has pieces of 4 bytes of eight.
  __device__ void store(float* out) const {
    for (int i = 0; i < kRows; ++i)
      for (int j = 0; j < kColumns; ++j)
        for (int high = 0; high < 2; ++high) {
          const int row = token0 + i * 16 + high * 8 + lane / 4, column = output0 + j * 8 + lane % 4 * 2;
          *reinterpret_cast<float2*>(out + row * kOutRow + column) = {sum[i][j][high * 2], sum[i][j][high * 2 + 1]};
        }
    finish_tile<T>(op, out, kOutRow, int64_t(blockIdx.y) * M, M, int64_t(blockIdx.x) * kOutputs);
  }
};

template <class T, int bits, int M>
__global__ void __launch_bounds__(kWarps * 32, M == 128 ? 1 : 2)
qlinear_gemm_kernel(const __grid_constant__ QLinear op, const __grid_constant__ Shares shares) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<bits, M>*>(memory);
  const int begin = blockIdx.z * shares.per_block, end = min(begin + shares.per_block, shares.tiles);
  ptx::dependency_release();
  const int warp = threadIdx.x / 32;
  Codes<bits> codes(op, shares, shared, warp, begin);
  Maker<T, bits> maker(op, shares, warp, begin, end);
  Multiplier<T, bits, M> product(op, shared, begin);
  auto make = [&](int tile) {
    maker.make(tile, shared.code[unsigned(tile) % kStages][warp][0], reinterpret_cast<char*>(shared.w[tile & 1][warp * mma::kBand]));
  };
  for (int tile = begin; tile < min(begin + kStages - 1, end); ++tile) codes.copy(tile);
  ptx::copy_commit();
  ptx::dependency_wait();  // weights are nobody's output, x is
  for (int tile = begin; tile < begin + kStages - 1; ++tile) {
    if (tile < end) product.copy_x(tile);
    ptx::copy_commit();
  }
  ptx::copy_wait<kStages - 1>();
  make(begin);
  for (int tile = begin; tile < end; ++tile) {
    ptx::copy_wait<kStages - 3>();
    __syncthreads();  // this tile's x and weights are there, and nobody reads those of the one before any more
    if (tile + kStages - 1 < end) codes.copy(tile + kStages - 1), product.copy_x(tile + kStages - 1);
    ptx::copy_commit();
    if (tile + 1 < end) make(tile + 1);
    product.multiply(tile);
  }
  ptx::copy_wait<0>();
  if (gridDim.z > 1 && !product.add_other_blocks(shares)) return;
  __syncthreads();  // shared memory becomes room for y
  product.store(reinterpret_cast<float*>(memory));
}

template <class T, int bits, int M>
void start(const QLinear& op, void* stream) {
  const mma::Split split = mma::gemm_split(op, M);
  const dim3 grid(unsigned(mma::blocks_of(op.n, kOutputs)), unsigned(mma::blocks_of(op.m, M)), unsigned(split.count));
  launch(qlinear_gemm_kernel<T, bits, M>, grid, dim3(kWarps * 32), shared_bytes<bits, M>(), stream, op,
         shares_of(op, split));
}

void run(const QLinear& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    auto of_bits = [&]<int bits>() {
      switch (mma::gemm_tokens(op)) {
        case 32: return start<T, bits, 32>(op, stream);
        case 64: return start<T, bits, 64>(op, stream);
        default: return shared_bytes<bits, 128>() <= shared_memory_limit() ? start<T, bits, 128>(op, stream) : start<T, bits, 64>(op, stream);
      }
    };
    op.bits == 4 ? of_bits.template operator()<4>() : of_bits.template operator()<8>();
  });
}

const Row<QLinear> row{{"qlinear_gemm_sm80", Device::cuda, Arch::sm80, 1, Layout::mma, refuses_mma, run}};

}  // namespace
}  // namespace pe
