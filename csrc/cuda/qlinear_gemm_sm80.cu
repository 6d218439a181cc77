// Quantized linear for any number of tokens: INT4 or INT8 weights of layout mma, f16 or bf16 activations, FP16 outliers.
//
// A block has 128 outputs and 32, 64 or 128 tokens. For each tile of 64 inputs every warp turns the codes of 16 outputs into weights in
// shared memory, scale and all, and writes its outliers over them, so that they cost nothing in the product. Meanwhile the tile before
// is multiplied from the other of two buffers, X·Wᵀ. Codes and x come by background copies, two tiles ahead of their use; a lane copies
// the very codes that it will read, so these need no barrier, and there is one barrier a tile.
//
// Rows of 128 bytes in shared memory are swizzled: the 16-byte piece c of row r lies at place c ^ f(r). f takes all of 0…7 over 8 rows,
// which is what reading matrices needs, and neighbours differ in bit 2, which is what writing four pieces of two rows at a time needs.
#include <algorithm>

#include "cuda/dequant.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout_mma.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kWarps = 8, kOutputs = mma::kGemmOutputs;
constexpr int kStages = 4;  // one tile is multiplied, one turned into weights, two are on their way
constexpr int kOutRow = kOutputs + 8;  // f32 of a row of y on its way out; 8 more put rows of a quarter warp into different banks
static_assert(kWarps * mma::kBand == kOutputs);

__device__ __forceinline__ int swizzle(int row, int piece) { return piece ^ ((row & 1) << 2 | (row >> 1 & 3)); }

template <int bits, int M>
struct alignas(16) Shared {
  uint4 w[2][kOutputs][8];
  uint4 x[kStages][M][8];
  uint4 code[kStages][kWarps][bits / 4][32];
};

template <int bits, int M>
constexpr size_t shared_bytes() {
  return std::max(sizeof(Shared<bits, M>), size_t(M * kOutRow * 4));
}

// A warp's share of making weights: the codes of 16 outputs, with their scales, zeros and outliers, each fetched a tile or more ahead.
template <class T, int bits, int M>
struct Maker {
  const QLinear& op;
  const Shares& shares;
  Shared<bits, M>& shared;
  int warp, lane, g, t, end;
  int w_place;              // byte of the lane's first piece in w
  uint32_t code_address;
  const uint4* weight;      // of the tile to be copied next
  size_t group_base;        // of scales and zeros: the first group of the lane's outputs g and g+8
  const uint32_t* offset;   // of the band's tiles of outliers
  __half2 scale[2];         // of the halves of the next tile
  uint32_t zero[2];
  uint32_t first, last, after;  // outliers of the next tile begin and end; those of the tile after it end
  uint32_t entry = 0;           // of the next tile, the lane's

  __device__ Maker(const QLinear& op, const Shares& shares, Shared<bits, M>& shared, int begin, int end)
      : op(op), shares(shares), shared(shared), end(end) {
    warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    // Of 128 outputs the last 64 may lie beyond n: then the tile before is computed twice, and its second result not stored.
    w_place = (warp * mma::kBand + g) * 128 + swizzle(g, t) * 16;
    code_address = ptx::shared(&shared.code[0][warp][0][lane]);
    const size_t tile = min(int(blockIdx.x * 2 + warp / 4), int((op.n - 1) / mma::kTile)), band = warp % 4;
    weight = reinterpret_cast<const uint4*>(op.weight) + ((tile * shares.tiles + begin) * 4 + band) * (bits / 4 * 32) + lane;
    group_base = tile * shares.groups * mma::kTile + g * 8 + band * 2;
    offset = op.outlier_offset + (tile * 4 + band) * shares.tiles;
    fetch_groups(begin);
    if (op.outlier_entry) {
      first = offset[begin], last = offset[begin + 1], after = offset[min(begin + 2, end)];
      fetch_entry();
    }
  }

  // The tiles' copies are asked for in their order. A pointer that moves with them stays in a register; one that is computed from the
  // tile the compiler computes at every tile from the beginning, 64 bits wide.
  __device__ void copy(unsigned tile) {
    const uint32_t to = code_address + tile % kStages * sizeof(shared.code[0]);
    for (int i = 0; i < bits / 4; ++i) ptx::copy_async(to + i * 512, weight + i * 32);
    weight += 4 * bits / 4 * 32;
  }

  __device__ void fetch_groups(int tile) {
    for (int i = 0; i < 2; ++i) {
      const int group = (tile * mma::kTile + i * 32) >> shares.group_shift;
      const size_t at = group_base + size_t(min(group, shares.groups - 1)) * mma::kTile;
      scale[i] = *reinterpret_cast<const __half2*>(static_cast<const __half*>(op.scale) + at);
      zero[i] = op.zero ? *reinterpret_cast<const uint16_t*>(op.zero + at) : (1 << (bits - 1)) * 0x101;
    }
  }

  __device__ void fetch_entry() { entry = first + lane < last ? op.outlier_entry[first + lane] : 0; }

  __device__ void place_outlier(char* w, uint32_t e) const {
    const int row = warp * mma::kBand + (e >> 12 & 15), c = e % mma::kTile;
    *reinterpret_cast<T*>(w + row * 128 + swizzle(row, c / 8) * 16 + c % 8 * 2) = outlier_value<T>(e);
  }

  // Makes the weights of a tile, and fetches what the next one needs.
  __device__ void make(int tile) {
    char* w = reinterpret_cast<char*>(shared.w[tile & 1]);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Dequant<T, bits> dequant(zero[half]);
      const uint4 piece = shared.code[unsigned(tile) % kStages][warp][bits == 8 ? half : 0][lane];
      const uint32_t word[4] = {piece.x, piece.y, piece.z, piece.w};
      uint32_t step[2][4];
      for (int i = 0; i < 2; ++i) dequant(word + (bits == 8 ? 2 * i : 2 * half + i), step[i]);
      for (int high = 0; high < 2; ++high) {
        const __half s = high ? __high2half(scale[half]) : __low2half(scale[half]);
        *reinterpret_cast<uint4*>(w + (w_place ^ half * 64) + high * 1024) = make_uint4(
            times<T>(step[0][high], s), times<T>(step[0][2 + high], s), times<T>(step[1][high], s), times<T>(step[1][2 + high], s));
      }
    }
    if (op.outlier_entry) {
      __syncwarp();  // the weights that they replace are there
      if (first + lane < last) place_outlier(w, entry);
#pragma unroll 1
      for (uint32_t at = first + 32 + lane; at < last; at += 32) place_outlier(w, op.outlier_entry[at]);
      first = last, last = after;
      fetch_entry();
      after = offset[min(tile + 3, end)];
    }
    if (tile + 1 < end) fetch_groups(tile + 1);
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
    __syncthreads();
    store_tile<T>(op, out, kOutRow, int64_t(blockIdx.y) * M, M, int64_t(blockIdx.x) * kOutputs, kOutputs);
  }
};

template <class T, int bits, int M>
__global__ void __launch_bounds__(kWarps * 32, M == 128 ? 1 : 2)
qlinear_gemm_kernel(const __grid_constant__ QLinear op, const __grid_constant__ Shares shares) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<bits, M>*>(memory);
  const int begin = blockIdx.z * shares.per_block, end = min(begin + shares.per_block, shares.tiles);
  ptx::dependency_release();
  Maker<T, bits, M> maker(op, shares, shared, begin, end);
  Multiplier<T, bits, M> product(op, shared, begin);
  for (int tile = begin; tile < min(begin + kStages - 1, end); ++tile) maker.copy(tile);
  ptx::copy_commit();
  ptx::dependency_wait();  // weights are nobody's output, x is
  for (int tile = begin; tile < begin + kStages - 1; ++tile) {
    if (tile < end) product.copy_x(tile);
    ptx::copy_commit();
  }
  ptx::copy_wait<kStages - 1>();
  maker.make(begin);
  for (int tile = begin; tile < end; ++tile) {
    ptx::copy_wait<kStages - 3>();
    __syncthreads();  // this tile's x and weights are there, and nobody reads those of the one before any more
    if (tile + kStages - 1 < end) maker.copy(tile + kStages - 1), product.copy_x(tile + kStages - 1);
    ptx::copy_commit();
    if (tile + 1 < end) maker.make(tile + 1);
    product.multiply(tile);
  }
  ptx::copy_wait<0>();
  if (gridDim.z > 1 && !product.add_other_blocks(shares)) return;
  __syncthreads();  // shared memory becomes room for y
  product.store(reinterpret_cast<float*>(memory));
}

template <class T, int bits, int M>
void start(const QLinear& op, void* stream) {
  const mma::Split split = mma::gemm_split(op);
  const dim3 grid(unsigned(mma::blocks_of(op.n, kOutputs)), unsigned(mma::blocks_of(op.m, M)), unsigned(split.count));
  launch(qlinear_gemm_kernel<T, bits, M>, grid, dim3(kWarps * 32), shared_bytes<bits, M>(), stream, op,
         shares_of(op, split, mma::gemm_blocks(op)));
}

void run(const QLinear& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    auto of_bits = [&]<int bits>() {
      switch (mma::gemm_tokens(op)) {
        case 32: return start<T, bits, 32>(op, stream);
        case 64: return start<T, bits, 64>(op, stream);
        default: return start<T, bits, 128>(op, stream);
      }
    };
    op.bits == 4 ? of_bits.template operator()<4>() : of_bits.template operator()<8>();
  });
}

const Row<QLinear> row{{"qlinear_gemm_sm80", Device::cuda, Arch::sm80, 1, Layout::mma, refuses_mma, run}};

}  // namespace
}  // namespace pe
