// The Kronecker transform of the sites of 4096 = 64 × 64 and 14336 = 112 × 128 activations on Hopper, as transform_sm80 does it for any size: both
// products on wgmma without padding, with several tokens under way.
//
// A block has both factors in shared memory, transposed, and takes tokens in turn. Four warps read them, make v of them and put it into a ring.
// Two warpgroups multiply, each 64 columns of tᵀ: uᵀ = rightᵀ·mat(v)ᵀ from shared memory, then tᵀ = uᵀ·left with u, rounded to f16, taken from the
// registers where the first product has left it: what is a sum there is an operand's place here. t, or its codes, leave by way of shared
// memory, which turns them round and makes whole rows of them.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/token_codes.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kGroups = 2, kReaders = 4;  // warpgroups that multiply, warps that read
constexpr int kThreads = kGroups * 128 + kReaders * 32;

template <int A, int B>
struct alignas(1024) Shared {  // 1024: the swizzle of operand() counts rows from there
  static constexpr int kShare = B / 64, kTokens = kGroups / kShare;  // warpgroups for a token, tokens at a time
  static constexpr int kStages = A * B <= 4096 ? 8 : 4;              // tokens in the ring: 64 or 112 KiB

  uint4 v[kStages][kShare][A][8];   // [64 columns][row]
  uint4 right[kShare][B][8];        // transposed: [64 rows][column]
  uint4 left[(A + 63) / 64][A][8];  // the same
  uint4 out[kTokens][A][B / 8];
  Range range[2][kGroups * 4];
  float squares[2][kReaders];
  uint64_t there[kStages], used[kStages];
};

__device__ __forceinline__ int swizzle(int row, int piece) { return piece ^ (row & 7); }

// A factor [size, size], transposed, its rows cut into pieces of 64 columns.
template <int size>
__device__ void load_factor(const void* from, uint4 (*to)[size][8]) {
  for (int i = threadIdx.x; i < size * size; i += kThreads) {
    const int r = i / size, c = i % size;
    __half* row = reinterpret_cast<__half*>(to[r / 64][c]);
    row[swizzle(c, r % 64 / 8) * 8 + r % 8] = static_cast<const __half*>(from)[i];
  }
}

template <int A, int B>
struct Reader {
  using Memory = Shared<A, B>;
  const Transform& op;
  Memory& shared;
  int thread;

  __device__ float factor(const __half* row, int turn) const {
    float sum = 0;
    for (int at = thread * 8; at < A * B; at += kReaders * 32 * 8) {
      float v[8];
      load8(row + at, v);
      for (int i = 0; i < 8; ++i) sum += v[i] * v[i];
    }
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    float(&part)[kReaders] = shared.squares[turn & 1];  // in turn, so that one barrier is enough
    if (thread % 32 == 0) part[thread / 32] = sum;
    ptx::barrier_of(1 + kGroups, kReaders * 32);
    return rsqrtf((part[0] + part[1] + part[2] + part[3]) / float(A * B) + op.eps);
  }

  __device__ void read(int64_t token, int turn) const {
    const int stage = turn % Memory::kStages;
    const __half* row = reinterpret_cast<const __half*>(op.x) + token * op.x_stride;
    const float scale = op.weight ? factor(row, turn) : 1;
    if (turn >= Memory::kStages) ptx::barrier_wait(&shared.used[stage], (turn / Memory::kStages & 1) ^ 1);
#pragma unroll 2
    for (int at = thread * 8; at < A * B; at += kReaders * 32 * 8) {
      float v[8];
      read_v(op, row, at, scale, v);
      uint32_t word[4];
      for (int i = 0; i < 4; ++i) word[i] = bits_of(__floats2half2_rn(v[2 * i], v[2 * i + 1]));
      const int r = at / B, c = at % B;
      shared.v[stage][c / 64][r][swizzle(r, c % 64 / 8)] = make_uint4(word[0], word[1], word[2], word[3]);
    }
    ptx::fence_async();
    __syncwarp();
    if (thread % 32 == 0) ptx::barrier_arrive(&shared.there[stage]);
  }

  __device__ void run() const {
    int turn = 0;
    for (int64_t first = int64_t(blockIdx.x) * Memory::kTokens; first < op.m; first += int64_t(gridDim.x) * Memory::kTokens)
      for (int i = 0; i < Memory::kTokens && first + i < op.m; ++i) read(first + i, turn++);
  }
};

template <int A, int B>
struct Multiplier {
  using Memory = Shared<A, B>;
  static constexpr int kThreadsOfToken = Memory::kShare * 128;
  const Transform& op;
  Memory& shared;
  int slot, part, warp, lane;  // token among those at a time, and 64 columns of it; the warp among a token's

  __device__ void wait_for_others() const { ptx::barrier_of(1 + slot, kThreadsOfToken); }

  // tᵀ of a token: rows 16·warp + g and 8 further of 64·part … are columns of t.
  __device__ void multiply(int turn, float (&t)[A / 2]) const {
    const int stage = turn % Memory::kStages;
    float u[A / 2] = {};
    ptx::barrier_wait(&shared.there[stage], turn / Memory::kStages & 1);
    ptx::pin(u);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < B / 16; ++k)
      ptx::wgmma(__half(), u, ptx::operand(shared.right[k / 4][part * 64]) + k % 4 * 2, ptx::operand(shared.v[stage][k / 4]) + k % 4 * 2);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
    __syncwarp();
    if (lane == 0) ptx::barrier_arrive(&shared.used[stage]);
    uint32_t a[A / 16][4];
    for (int i = 0; i < A / 4; ++i) a[i / 4][i % 4] = bits_of(__floats2half2_rn(u[2 * i], u[2 * i + 1]));
    for (auto& step : a) ptx::pin(step);
    for (float& sum : t) sum = 0;
    ptx::pin(t);
    ptx::wgmma_fence();
#pragma unroll
    for (int k = 0; k < A / 16; ++k) ptx::wgmma(__half(), t, a[k], ptx::operand(shared.left[k / 4]) + k % 4 * 2);
    ptx::wgmma_commit();
    ptx::wgmma_wait<0>();
  }

  // The token's values, two to a word by f(first, second), as rows of 16-bit values.
  template <class F>
  __device__ void turn_round(const float (&t)[A / 2], F f) const {
    for (int j = 0; j < A / 8; j += 2) {
      uint32_t word[4];  // columns g and g+8 by rows 2·(lane % 4) of 8, and of the next 8
      for (int i = 0; i < 4; ++i) word[i] = f(t[4 * j + 2 * i], t[4 * j + 2 * i + 1]);
      const int row = (j + lane / 16) * 8 + lane % 8, piece = part * 8 + warp % 4 * 2 + lane / 8 % 2;
      ptx::store_matrices_transposed(ptx::shared(&shared.out[slot][row][swizzle(row, piece)]), word);
    }
    wait_for_others();
  }
  __device__ uint4 piece_of(int at) const {
    const int row = at / B;
    return shared.out[slot][row][swizzle(row, at % B / 8)];
  }

  __device__ Range range_of(const float (&t)[A / 2], int turn) const {
    Range range;
    for (float v : t) range.add(v);
    for (int step = 16; step > 0; step /= 2) {
      Range other;
      other.high = __shfl_xor_sync(0xffffffffu, range.high, step), other.low = __shfl_xor_sync(0xffffffffu, range.low, step);
      range.add(other);
    }
    Range* all = shared.range[turn & 1] + slot * Memory::kShare * 4;
    if (lane == 0) all[warp] = range;
    wait_for_others();
    for (int w = 0; w < Memory::kShare * 4; ++w) range.add(all[w]);
    return range;
  }

  __device__ void store(int64_t token, int turn, const float (&t)[A / 2]) const {
    const int thread = warp * 32 + lane;
    if (op.y) {
      turn_round(t, [](float a, float b) { return bits_of(__floats2half2_rn(a, b)); });
      for (int at = thread * 8; at < A * B; at += kThreadsOfToken * 8)
        ptx::store16(reinterpret_cast<__half*>(op.y) + token * op.y_stride + at, piece_of(at));
      wait_for_others();
    }
    if (!op.code) return;
    const Quantizer quantizer(op.bits, op.clip, range_of(t, turn));
    if (thread == 0) op.scale[token] = quantizer.scale;
    turn_round(t, [&](float a, float b) { return __byte_perm(quantizer.code(a), quantizer.code(b), 0x5410); });
    char* to = static_cast<char*>(op.code) + token * (A * B) * op.bits / 8;
    for (int i = thread; i < A * B * op.bits / 128; i += kThreadsOfToken) {
      uint32_t word[4];
      for (int j = 0; j < 4; ++j) {
        const uint4 codes = piece_of(op.bits == 8 ? i * 16 + j / 2 * 8 : i * 32 + j * 8);
        const uint32_t low = __byte_perm(codes.x, codes.y, 0x6420), high = __byte_perm(codes.z, codes.w, 0x6420);
        word[j] = op.bits == 8 ? (j % 2 ? high : low) : nibbles(low) | nibbles(high) << 16;
      }
      ptx::store16(to + i * 16, make_uint4(word[0], word[1], word[2], word[3]));
    }
    wait_for_others();
  }
  // The low halves of four bytes, side by side.
  static __device__ uint32_t nibbles(uint32_t v) {
    v &= 0x0f0f0f0fu;
    v |= v >> 4;
    return (v & 0xff) | (v >> 8 & 0xff00);
  }

  __device__ void run() const {
    int turn = slot;
    for (int64_t token = int64_t(blockIdx.x) * Memory::kTokens + slot; token < op.m; token += int64_t(gridDim.x) * Memory::kTokens) {
      float t[A / 2];
      multiply(turn, t);
      store(token, turn / Memory::kTokens, t);
      turn += Memory::kTokens;
    }
  }
};

template <int A, int B>
__global__ void __launch_bounds__(kThreads, 1)
transform_kernel(const __grid_constant__ Transform op) {
  extern __shared__ __align__(1024) unsigned char memory[];
  auto& shared = *reinterpret_cast<Shared<A, B>*>(memory);
  ptx::dependency_release();
  if (threadIdx.x == 0) {
    for (int s = 0; s < shared.kStages; ++s) ptx::barrier_init(&shared.there[s], kReaders), ptx::barrier_init(&shared.used[s], shared.kShare * 4);
    ptx::barrier_init_done();
  }
  load_factor(op.left, shared.left), load_factor(op.right, shared.right);
  ptx::fence_async();
  __syncthreads();
  ptx::dependency_wait();  // factors are nobody's output, x is, and y may be somebody's input
  const int warp = threadIdx.x / 32, group = warp / 4;
  if (group == kGroups)
    Reader<A, B>{op, shared, int(threadIdx.x) - kGroups * 128}.run();
  else
    Multiplier<A, B>{op, shared, group / shared.kShare, group % shared.kShare, warp % (shared.kShare * 4), int(threadIdx.x) % 32}.run();
}

const char* refuses(const Transform& op) {
  if (const char* why = refuses_transform(op)) return why;
  if (op.dtype != Dtype::f16) return "takes f16 activations";
  if (!op.left || !op.right) return "takes two factors";
  return (op.a == 64 && op.b == 64) || (op.a == 112 && op.b == 128) ? nullptr : "takes factors of 64 and 64, or 112 and 128";
}

template <int A, int B>
void start(const Transform& op, void* stream) {
  using Memory = Shared<A, B>;
  const int64_t blocks = std::min<int64_t>((op.m + Memory::kTokens - 1) / Memory::kTokens, processors());
  launch(transform_kernel<A, B>, dim3(unsigned(blocks)), dim3(kThreads), sizeof(Memory), stream, op);
}

void run(const Transform& op, void* stream) {
  if (op.m == 0) return;
  op.a == 64 ? start<64, 64>(op, stream) : start<112, 128>(op, stream);
}

const Row<Transform> row{{"transform_sm90", Device::cuda, Arch::sm90a, 3, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
