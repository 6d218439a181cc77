// Quantized linear with INT8 or INT4 activations on Hopper: W8A8, W4A8, and W4A4 on the INT8 tensor cores, which are the only ones there.
// Sums are exact.
//
// A block has 128 outputs and 64 or 128 tokens, W·Xᵀ, 128 inputs at a time in a ring in shared memory. Two warpgroups multiply, each 64 outputs,
// with weights as the operand in registers: while the tensor cores are busy with a tile of 64 inputs, the codes of the next one become
// operands. Four more warps see to it that weights and x come: by the copy engine, except that INT4 activations go through registers, where
// they become the bytes that the tensor cores take, 16 times as large. With groups a block has 64 tokens: each sum is in registers twice, of
// the group and of all.
#include <algorithm>

#include "cuda/int_gemm.cuh"
#include "cuda/launch.cuh"
#include "cuda/tensor_map.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kMultipliers = 8, kSuppliers = 4, kOutputs = mma::kGemmOutputs;
constexpr int kThreads = (kMultipliers + kSuppliers) * 32;
constexpr int kTiles = 2;   // of 64 inputs, a stage's: rows of 128 codes
constexpr int kStages = 6;  // for 128 tokens and W8 6 · (16 + 16) KiB of the 227 a block may have

template <int bits, int M>
struct alignas(1024) Shared {  // 1024: the swizzle of operand() counts rows from there
  uint4 x[kStages][M][8];
  uint4 code[kStages][2][kTiles][4][bits / 4][32];  // [outputs / 64][tile][band]
  uint64_t there[kStages], used[kStages];
};

template <int bits, int M>
constexpr size_t shared_bytes() {
  return std::max(sizeof(Shared<bits, M>), out_bytes(M, kIntRow));
}

// Stage and phase of a block's i-th pair of tiles.
struct Turn {
  int stage, parity;
  __device__ explicit Turn(int i) : stage(i % kStages), parity(i / kStages & 1) {}
};

// The part of the inputs that is a block's.
struct Inputs {
  int begin, end, pairs;  // tiles
  __device__ explicit Inputs(const Shares& shares) {
    begin = blockIdx.z * shares.per_block, end = min(begin + shares.per_block, shares.tiles), pairs = (end - begin + kTiles - 1) / kTiles;
  }
};

template <int bits, int act, int M>
struct Supplier {
  static constexpr int kPieces = M * 4 / (kSuppliers * 32);  // of 32 INT4 codes, a thread's of a pair of tiles

  const QLinear& op;
  const Shares& shares;
  const Inputs inputs;
  Shared<bits, M>& shared;
  const CUtensorMap& map;
  int thread;
  uint4 piece[kPieces];  // of the pair that is supplied next

  // Where a row has an odd number of tiles, the last one comes twice: x is 0 there.
  __device__ void codes(int pair) const {
    constexpr int kBytes = sizeof(shared.code[0][0][0]);
    const int stage = Turn(pair).stage;
    ptx::barrier_expect(&shared.there[stage], 2 * kTiles * kBytes);
    for (int i = 0; i < 2 * kTiles; ++i) {
      const int tile = min(inputs.begin + pair * kTiles + i % kTiles, inputs.end - 1);
      ptx::copy_bulk(shared.code[stage][i / kTiles][i % kTiles], codes_of<bits>(op, shares, i / kTiles * 4, tile), kBytes, &shared.there[stage]);
    }
  }
  __device__ void copy_x(int pair) const {
    const int stage = Turn(pair).stage;
    ptx::barrier_expect(&shared.there[stage], sizeof(shared.x[0]));
    ptx::copy_box(shared.x[stage], &map, (inputs.begin + pair * kTiles) * mma::kTile, blockIdx.y * M, &shared.there[stage]);
  }

  __device__ void fetch_x(int pair) {
    for (int i = 0; i < kPieces; ++i) {
      const int64_t token = int64_t(blockIdx.y) * M + i * (kSuppliers * 8) + thread / 4;
      const int64_t at = int64_t(inputs.begin + pair * kTiles) * (mma::kTile / 2) + thread % 4 * 16;
      piece[i] = uint4{};
      if (token < op.m && at < op.k / 2) piece[i] = *reinterpret_cast<const uint4*>(static_cast<const char*>(op.x_code) + token * (op.k / 2) + at);
    }
  }
  __device__ void spread_x(int pair) const {
    auto& x = shared.x[Turn(pair).stage];
    for (int i = 0; i < kPieces; ++i) {
      const int row = i * (kSuppliers * 8) + thread / 4;
      const uint32_t word[4] = {piece[i].x, piece[i].y, piece[i].z, piece[i].w};
      uint32_t spread[8];
      for (int j = 0; j < 4; ++j) {
        const uint32_t even = word[j] << 4 & 0xf0f0f0f0u, odd = word[j] & 0xf0f0f0f0u;
        spread[2 * j] = __byte_perm(even, odd, 0x5140), spread[2 * j + 1] = __byte_perm(even, odd, 0x7362);
      }
      for (int j = 0; j < 2; ++j)
        x[row][swizzle(row, thread % 4 * 2 + j)] = make_uint4(spread[4 * j], spread[4 * j + 1], spread[4 * j + 2], spread[4 * j + 3]);
    }
  }

  __device__ void run() {
    const bool copies = thread == 0;
    if (copies)
      for (int pair = 0; pair < min(kStages, inputs.pairs); ++pair) codes(pair);
    if (act == 8 && !copies) return;
    // Weights are nobody's output, x is. The thread that copies waits for all: the residual and the workspace are touched after x.
    ptx::dependency_wait();
    if constexpr (act == 4) fetch_x(0);
    for (int pair = 0; pair < inputs.pairs; ++pair) {
      const Turn turn(pair);
      if (pair >= kStages) {
        ptx::barrier_wait(&shared.used[turn.stage], turn.parity ^ 1);
        if (copies) codes(pair);
      }
      if constexpr (act == 8) {
        copy_x(pair);
      } else {
        spread_x(pair);
        if (pair + 1 < inputs.pairs) fetch_x(pair + 1);
        ptx::fence_async();
        __syncwarp();
        if (threadIdx.x % 32 == 0) ptx::barrier_arrive(&shared.there[turn.stage]);
      }
    }
  }
};

template <int N>
__device__ __forceinline__ void pin(int (&sum)[N]) {
  ptx::pin(reinterpret_cast<uint32_t(&)[N]>(sum));
}

// A warpgroup, for 64 outputs. With groups what it finds is in `total`, else in `sum`.
template <int bits, int M, bool grouped>
__device__ void multiply(const QLinear& op, const Shares& shares, Shared<bits, M>& shared, const Inputs& inputs, int (&sum)[M / 2],
                         float (&total)[grouped ? M / 2 : 1]) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int pair = 0; pair < inputs.pairs; ++pair) {
    const Turn turn(pair);
    ptx::barrier_wait(&shared.there[turn.stage], turn.parity);
    const uint64_t x = ptx::operand(shared.x[turn.stage]);
    uint32_t w[kTiles][2][4];  // what the tensor cores still read of one tile stays as it is while the next one's is made
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      int8_rows<bits>(shared.code[turn.stage][warp / 4][tile][warp % 4][0], lane, w[tile]);
      for (int half = 0; half < 2; ++half) ptx::pin(w[tile][half]);
      ptx::wgmma_fence();
      for (int half = 0; half < 2; ++half) ptx::wgmma_int8(sum, w[tile][half], x + tile * 4 + half * 2);
      ptx::wgmma_commit();
      if constexpr (grouped) {
        const int at = inputs.begin + pair * kTiles + tile;
        const float2 scale = group_scales(op, shares, warp, at);
        ptx::wgmma_wait<0>();
        pin(sum);  // the compiler takes the sums for ready where the product was asked for
        if (ends_group(shares, at)) add_group<M / 2>(sum, total, scale);
        pin(sum);  // zeros are there before the next wgmma_fence()
      } else {
        ptx::wgmma_wait<1>();
      }
      if (tile > 0 || pair == 0) continue;
      __syncwarp();  // all lanes have read the pair before, and the tensor cores too
      if (lane == 0) ptx::barrier_arrive(&shared.used[Turn(pair - 1).stage]);
    }
  }
  ptx::wgmma_wait<0>();
  pin(sum);
}

template <bool grouped, class Sum, class Total>
__device__ __forceinline__ auto& found(Sum& sum, Total& total) {
  if constexpr (grouped)
    return total;
  else
    return sum;
}

template <int bits, int act, int M, bool grouped>
__global__ void __launch_bounds__(kThreads, 1)
qlinear_int_kernel(const __grid_constant__ QLinear op, const __grid_constant__ Shares shares, const __grid_constant__ CUtensorMap map) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<bits, M>*>(memory);
  const Inputs inputs(shares);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::dependency_release();
  if (threadIdx.x == 0) {
    // There: the codes' bytes are announced, and x's are, or four warps have written x.
    for (int s = 0; s < kStages; ++s) {
      ptx::barrier_init(&shared.there[s], act == 8 ? 2 : 1 + kSuppliers);
      ptx::barrier_init(&shared.used[s], kMultipliers);
    }
    ptx::barrier_init_done();
  }
  __syncthreads();
  int sum[M / 2] = {};
  float total[grouped ? M / 2 : 1] = {};
  if (warp < kMultipliers)
    multiply<bits, M, grouped>(op, shares, shared, inputs, sum, total);
  else
    Supplier<bits, act, M>{op, shares, inputs, shared, map, int(threadIdx.x) - kMultipliers * 32}.run();
  auto& sums = found<grouped>(sum, total);
  if (gridDim.z > 1 && !add_other_sums(shares, kMultipliers * 32, sums)) return;
  __syncthreads();  // shared memory becomes room for y
  float* out = reinterpret_cast<float*>(memory);
  if (warp < kMultipliers)
    for (int j = 0; j < M / 8; ++j) put_sums(sums + j * 4, out, j * 8 + lane % 4 * 2, warp * mma::kBand + lane / 4);
  __syncthreads();
  store_sums<grouped>(op, out, M, bits == 8 ? 1 : act == 8 ? kTimes : kTimes * kTimes);
}

template <int bits, int act, int M, bool grouped>
void start(const QLinear& op, void* stream) {
  mma::Split split = mma::gemm_split(op, M);
  split.per_block = int(mma::blocks_of(split.per_block, kTiles)) * kTiles;  // but at the end of a row, blocks have whole pairs
  split.count = int(mma::blocks_of(mma::blocks_of(op.k, mma::kTile), split.per_block));
  const dim3 grid(unsigned(mma::blocks_of(op.n, kOutputs)), unsigned(mma::blocks_of(op.m, M)), unsigned(split.count));
  const CUtensorMap map = act == 8 ? tensor_map(CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, op.x_code, op.k, op.m, op.k, M) : CUtensorMap{};
  launch(qlinear_int_kernel<bits, act, M, grouped>, grid, dim3(kThreads), shared_bytes<bits, M>(), stream, op,
         shares_of(op, split), map);
}

void run(const QLinear& asked, void* stream) {
  if (asked.m == 0) return;
  const QLinear op = with_codes(asked, stream);
  auto of_types = [&]<int bits, int act>() {
    if (op.group < op.k) return start<bits, act, 64, true>(op, stream);
    op.m <= 64 ? start<bits, act, 64, false>(op, stream) : start<bits, act, 128, false>(op, stream);
  };
  if (op.bits == 8)
    of_types.template operator()<8, 8>();
  else
    op.act_bits == 8 ? of_types.template operator()<4, 8>() : of_types.template operator()<4, 4>();
}

const Row<QLinear> row{{"qlinear_int_sm90", Device::cuda, Arch::sm90a, 5, Layout::mma, refuses_int, run}};

}  // namespace
}  // namespace pe
