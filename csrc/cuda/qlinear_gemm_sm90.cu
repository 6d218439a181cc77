// Quantized linear for more than 16 tokens on Hopper: INT4 or INT8 weights of layout mma, f16 or bf16 activations, FP16 outliers
// and columns.
//
// A block has 128 outputs and 64 or 128 tokens, and two kinds of warps, which meet at barriers in shared memory, tile of 64 inputs by tile:
// eight warps turn codes into weights in shared memory, with the outliers written over them, and one of their threads has the copy engine
// bring codes and x; a warpgroup for each 64 tokens multiplies, X·Wᵀ, with both operands in shared memory. Makers work up to kStages tiles
// ahead, and codes come as far ahead of them. A warp of its own for the copies would be the 17th and leave each thread 96 registers
// instead of 128, since registers belong to quarters of the processor: too few for 64 sums and their addresses.
#include <algorithm>

#include "cuda/columns.cuh"
#include "cuda/launch.cuh"
#include "cuda/make_weights.cuh"
#include "cuda/ptx.cuh"
#include "cuda/tensor_map.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kMakers = 8, kOutputs = mma::kGemmOutputs;
constexpr int kStages = 4;  // for 128 tokens and INT8 4 · (16 + 16 + 8) KiB of the 227 a block may have
constexpr int kOutRow = kOutputs + 8;  // f32 of a row of y on its way out; 8 more put rows of a quarter warp into different banks
static_assert(kMakers * mma::kBand == kOutputs);

template <int bits, int G>  // G: warpgroups that multiply
struct alignas(1024) Shared {  // 1024: the swizzle of operand() counts rows from there
  uint4 x[kStages][64 * G][8];
  uint4 w[kStages][kOutputs][8];
  uint4 code[kStages][kMakers][bits / 4][32];
  uint64_t codes_there[kStages], codes_used[kStages], x_there[kStages], w_there[kStages], used[kStages];  // used: x and w
};

template <int bits, int G>
constexpr size_t shared_bytes() {
  return std::max(sizeof(Shared<bits, G>), out_bytes(64 * G, kOutRow));
}

template <int G>
constexpr int kThreads = (4 * G + kMakers) * 32;

// Stage and phase of the i-th tile of a block.
struct Turn {
  int stage, parity;
  __device__ explicit Turn(int i) : stage(i % kStages), parity(i / kStages & 1) {}
};

// What one thread asks of the copy engine for the i-th tile.
template <int bits, int G>
struct Copies {
  const QLinear& op;
  const Shares& shares;
  Shared<bits, G>& shared;
  const CUtensorMap& map;
  int begin;

  __device__ void codes(int i) const {
    constexpr int kBytes = sizeof(shared.code[0]) / 2;  // of a tile of 64 outputs
    const int stage = Turn(i).stage;
    ptx::barrier_expect(&shared.codes_there[stage], 2 * kBytes);
    for (int half = 0; half < 2; ++half)
      ptx::copy_bulk(shared.code[stage][half * 4], codes_of<bits>(op, shares, half * 4, begin + i), kBytes, &shared.codes_there[stage]);
  }
  __device__ void x(int i) const {
    const int stage = Turn(i).stage;
    ptx::barrier_expect(&shared.x_there[stage], sizeof(shared.x[0]));
    ptx::copy_box(shared.x[stage], &map, (begin + i) * mma::kTile, blockIdx.y * 64 * G, &shared.x_there[stage]);
  }
};

// A warp, for the 16 outputs of a band.
template <class T, int bits, int G>
__device__ void make(const Copies<bits, G>& copies, int band, int count) {
  Shared<bits, G>& shared = copies.shared;
  const bool copies_too = band == 0 && threadIdx.x % 32 == 0;
  if (copies_too)
    for (int i = 0; i < min(kStages, count); ++i) copies.codes(i);
  Maker<T, bits> maker(copies.op, copies.shares, band, copies.begin, copies.begin + count);
  // Weights are nobody's output, x is. One thread waits for all: the residual and the workspace are touched when x has been multiplied.
  if (copies_too) ptx::dependency_wait();
  for (int i = 0; i < count; ++i) {
    const Turn turn(i), before(i - 1);
    if (i >= kStages) ptx::barrier_wait(&shared.used[turn.stage], turn.parity ^ 1);
    if (copies_too) {
      copies.x(i);
      if (i > 0 && i - 1 + kStages < count) {
        ptx::barrier_wait(&shared.codes_used[before.stage], before.parity);
        copies.codes(i - 1 + kStages);
      }
    }
    ptx::barrier_wait(&shared.codes_there[turn.stage], turn.parity);
    maker.make(copies.begin + i, shared.code[turn.stage][band][0], reinterpret_cast<char*>(shared.w[turn.stage][band * mma::kBand]));
    ptx::fence_async();
    __syncwarp();
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(&shared.codes_used[turn.stage]), ptx::barrier_arrive(&shared.w_there[turn.stage]);
  }
}

// A warpgroup, for 64 tokens.
template <class T, int bits, int G>
__device__ void multiply(Shared<bits, G>& shared, int group, int count, float (&sum)[64]) {
  auto release = [&](int i) {
    if (threadIdx.x % 32 == 0) ptx::barrier_arrive(&shared.used[Turn(i).stage]);
  };
  for (int i = 0; i < count; ++i) {
    const Turn turn(i);
    ptx::barrier_wait(&shared.x_there[turn.stage], turn.parity);
    ptx::barrier_wait(&shared.w_there[turn.stage], turn.parity);
    const uint64_t a = ptx::operand(shared.x[turn.stage][group * 64]), b = ptx::operand(shared.w[turn.stage]);
    ptx::wgmma_fence();
    for (int step = 0; step < 4; ++step) ptx::wgmma(T(), sum, a + step * 2, b + step * 2);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();  // the tile before has been read
    if (i > 0) release(i - 1);
  }
  ptx::wgmma_wait<0>();
}

// Adds what the other blocks of this tile of y have found; false in all of them but the last to come. All threads of a block come here.
template <int G>
__device__ bool add_other_blocks(const Shares& shares, float (&sum)[64]) {
  const unsigned tile = blockIdx.y * gridDim.x + blockIdx.x;
  const bool mine = threadIdx.x < G * 128;
  auto place = [&](int block, int i) { return shares.sums + ((size_t(tile) * gridDim.z + block) * 16 + i) * (G * 128) + threadIdx.x; };
  if (mine)
    for (int i = 0; i < 16; ++i) *place(blockIdx.z, i) = make_float4(sum[4 * i], sum[4 * i + 1], sum[4 * i + 2], sum[4 * i + 3]);
  if (!last_to_come(shares.counter + tile, gridDim.z)) return false;
  if (!mine) return true;
#pragma unroll 1
  for (int block = 0; block < int(gridDim.z); ++block)
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const float4 other = __ldcg(place(block, i));
      float* v = sum + 4 * i;
      if (block == 0) v[0] = v[1] = v[2] = v[3] = 0;
      v[0] += other.x, v[1] += other.y, v[2] += other.z, v[3] += other.w;
    }
  return true;
}

template <class T, int bits, int G>
__global__ void __launch_bounds__(kThreads<G>, 1)
qlinear_gemm_kernel(const __grid_constant__ QLinear op, const __grid_constant__ Shares shares, const __grid_constant__ CUtensorMap x) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<bits, G>*>(memory);
  const int begin = blockIdx.z * shares.per_block, count = min(shares.per_block, shares.tiles - begin);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  ptx::dependency_release();
  if (threadIdx.x == 0) {
    for (int s = 0; s < kStages; ++s) {
      ptx::barrier_init(&shared.codes_there[s], 1), ptx::barrier_init(&shared.codes_used[s], kMakers);
      ptx::barrier_init(&shared.x_there[s], 1), ptx::barrier_init(&shared.w_there[s], kMakers), ptx::barrier_init(&shared.used[s], 4 * G);
    }
    ptx::barrier_init_done();
  }
  __syncthreads();
  float sum[64] = {};
  if (warp < 4 * G)
    multiply<T, bits, G>(shared, warp / 4, count, sum);
  else
    make<T, bits, G>({op, shares, shared, x, begin}, warp - 4 * G, count);
  if (gridDim.z > 1 && !add_other_blocks<G>(shares, sum)) return;
  __syncthreads();  // shared memory becomes room for y
  float* out = reinterpret_cast<float*>(memory);
  if (warp < 4 * G)
    for (int i = 0; i < 32; ++i)
      *reinterpret_cast<float2*>(out + (warp * 16 + i % 2 * 8 + lane / 4) * kOutRow + i / 2 * 8 + lane % 4 * 2) = {sum[2 * i], sum[2 * i + 1]};
  finish_tile<T>(op, out, kOutRow, int64_t(blockIdx.y) * 64 * G, 64 * G, int64_t(blockIdx.x) * kOutputs);
}

// x as the copy engine sees it: boxes of `tokens` rows of 64 inputs.
CUtensorMap map_of(const QLinear& op, int tokens) {
  const auto type = op.dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  return tensor_map(type, 2, op.x, op.k, op.m, op.x_stride * 2, tokens);
}

const char* refuses(const QLinear& op) {
  if (op.m > 0 && op.m <= 16) return "takes more than 16 tokens";
  return refuses_mma(op);
}

template <class T, int bits, int G>
void start(const QLinear& op, void* stream) {
  const mma::Split split = mma::gemm_split(op, 64 * G);
  const dim3 grid(unsigned(mma::blocks_of(op.n, kOutputs)), unsigned(mma::blocks_of(op.m, 64 * G)), unsigned(split.count));
  launch(qlinear_gemm_kernel<T, bits, G>, grid, dim3(kThreads<G>), shared_bytes<bits, G>(), stream, op, shares_of(op, split),
         map_of(op, 64 * G));
}

void run(const QLinear& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    if (op.bits == 4)
      op.m <= 64 ? start<T, 4, 1>(op, stream) : start<T, 4, 2>(op, stream);
    else
      op.m <= 64 ? start<T, 8, 1>(op, stream) : start<T, 8, 2>(op, stream);
  });
}

const Row<QLinear> row{{"qlinear_gemm_sm90", Device::cuda, Arch::sm90a, 3, Layout::mma, refuses, run}};

}  // namespace
}  // namespace pe
