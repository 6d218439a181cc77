// RoPE with what FlatQuant wants after it: a change of basis of q and k, and a cache of 8 or 4 bits. A warp takes up to four heads of a row, q's,
// k's or v's, so that an element of the basis is read once for all of them; the turned heads lie in shared memory side by side, where one
// access brings all lanes an element of each. All in f32.
#include "cuda/half.cuh"
#include "cuda/launch.cuh"
#include "cuda/token_codes.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kWarps = 4, kHeads = 4;           // heads of a warp
constexpr int kDim = 256, kPairs = kDim / 64;  // a lane has elements 2·lane + 64j and the next one

// The heads of a warp: `count` of them from `first` on, counted from the first of q.
struct Heads {
  int first = 0, count = 0;
  bool is_k = false, is_v = false;
  __device__ Heads(const RopeKV& op, int warp) {
    const int q = (int(op.heads) + kHeads - 1) / kHeads, kv = (int(op.kv_heads) + kHeads - 1) / kHeads;
    if (warp >= q + 2 * kv) return;
    is_v = warp >= q + kv, is_k = !is_v && warp >= q;
    const int begin = is_v ? int(op.heads + op.kv_heads) : is_k ? int(op.heads) : 0;
    const int among = int(is_k || is_v ? op.kv_heads : op.heads), at = (is_v ? warp - q - kv : is_k ? warp - q : warp) * kHeads;
    first = begin + at, count = min(kHeads, among - at);
  }
};

// Turns the heads, one after another, into x[element][head].
template <class T>
__device__ void turn(const RopeKV& op, const Heads& heads, int row, float (*x)[kHeads]) {
  const int d = int(op.head_dim), half = d / 2;
  for (int h = 0; h < kHeads; ++h) {
    const T* from = reinterpret_cast<const T*>(op.qkv) + row * op.qkv_stride + int64_t(heads.first + h) * d;
    for (int c = threadIdx.x % 32; c < half; c += 32) {
      float a = 0, b = 0;
      if (h < heads.count) a = float(from[c]), b = float(from[half + c]);
      if (!heads.is_v) {
        const size_t angle = size_t(op.position[row]) * half + c;
        const float cos = op.cos[angle], sin = op.sin[angle], turned = a * cos - b * sin;
        b = b * cos + a * sin, a = turned;
      }
      x[c][h] = a, x[half + c][h] = b;
    }
  }
}

struct Head {
  float v[kPairs][2];
};

// The lane's elements of the four heads, in the new basis if there is one.
__device__ void change_basis(const __half* basis, int d, const float (*x)[kHeads], Head (&heads)[kHeads]) {
  const int c = threadIdx.x % 32 * 2;
  if (!basis) {
    for (int j = 0; j < kPairs; ++j)
      for (int e = 0; e < 2; ++e)
        for (int h = 0; h < kHeads; ++h) heads[h].v[j][e] = c + j * 64 < d ? x[c + j * 64 + e][h] : 0;
    return;
  }
  for (Head& head : heads) head = {};
  for (int k = 0; k < d; ++k) {
    const float4 four = *reinterpret_cast<const float4*>(x[k]);
    const float values[kHeads] = {four.x, four.y, four.z, four.w};
    for (int j = 0; j < kPairs; ++j) {
      if (c + j * 64 >= d) continue;
      const float2 to = __half22float2(*reinterpret_cast<const __half2*>(basis + k * d + c + j * 64));
      for (int h = 0; h < kHeads; ++h) heads[h].v[j][0] += values[h] * to.x, heads[h].v[j][1] += values[h] * to.y;
    }
  }
}

__device__ Range range_of(const Head& head) {
  Range range;
  for (int j = 0; j < kPairs; ++j) range.add(head.v[j][0]), range.add(head.v[j][1]);
  for (int step = 16; step > 0; step /= 2) {
    Range other;
    other.high = __shfl_xor_sync(0xffffffffu, range.high, step), other.low = __shfl_xor_sync(0xffffffffu, range.low, step);
    range.add(other);
  }
  return range;
}

// To the keys or the values of the cache, from element `at` on.
__device__ void put(const KVCache& cache, const Head& head, bool is_v, const float* clip, int64_t at, int d) {
  const int lane = threadIdx.x % 32;
  void* to = is_v ? cache.v : cache.k;
  auto each = [&](auto store) {
    for (int j = 0; j < kPairs; ++j)
      if (lane * 2 + j * 64 < d) store(at + lane * 2 + j * 64, head.v[j][0], head.v[j][1]);
  };
  if (cache.bits == 16)
    return each([&](int64_t i, float a, float b) { *reinterpret_cast<__half2*>(static_cast<__half*>(to) + i) = __floats2half2_rn(a, b); });
  const Range range = range_of(head);
  float* scale = (is_v ? cache.v_scale : cache.k_scale) + at / d;
  if (cache.bits == 8) {
    const Quantizer quantizer(8, nullptr, range);
    if (lane == 0) *scale = quantizer.scale;
    return each([&](int64_t i, float a, float b) {
      *reinterpret_cast<uint16_t*>(static_cast<int8_t*>(to) + i) = uint16_t(__byte_perm(quantizer.code(a), quantizer.code(b), 0x0040));
    });
  }
  const float high = clip ? clip[0] * range.high : range.high, low = clip ? clip[1] * -range.low : -range.low;
  const float step = range.finite() ? (high - low) / 15 : NAN, inverse = step > 0 ? 1 / step : 0;
  auto whole = [](float v) { return v == v ? rintf(v) : 0; };  // 0 · infinity, beside values of 1e-37 alone
  const float zero = fminf(fmaxf(whole(-low * inverse), 0), 15);
  auto code = [&](float v) { return uint32_t(fminf(fmaxf(whole(v * inverse) + zero, 0), 15)); };
  if (lane == 0) *scale = step, (is_v ? cache.v_zero : cache.k_zero)[at / d] = uint8_t(zero);
  each([&](int64_t i, float a, float b) { static_cast<uint8_t*>(to)[i / 2] = uint8_t(code(a) | code(b) << 4); });
}

template <class T>
__global__ void __launch_bounds__(kWarps * 32)
rope_kv_codes_kernel(const __grid_constant__ RopeKV op) {
  __shared__ __align__(16) float turned[kWarps][kDim][kHeads];
  ptx::dependency_release();
  ptx::dependency_wait();
  const int row = blockIdx.x, warp = threadIdx.x / 32, lane = threadIdx.x % 32, d = int(op.head_dim);
  const Heads heads(op, blockIdx.y * kWarps + warp);
  if (heads.count == 0) return;
  turn<T>(op, heads, row, turned[warp]);
  __syncwarp();
  Head head[kHeads];
  change_basis(static_cast<const __half*>(heads.is_v ? nullptr : heads.is_k ? op.k_transform : op.q_transform), d, turned[warp], head);
#pragma unroll
  for (int h = 0; h < kHeads; ++h) {
    if (h >= heads.count) continue;
    if (heads.is_k || heads.is_v) {
      const int kv_head = heads.first + h - int(op.heads) - (heads.is_v ? int(op.kv_heads) : 0);
      const int64_t at = op.slot[row] * op.cache.slot_stride + kv_head * op.cache.head_stride + int64_t(op.position[row]) * d;
      put(op.cache, head[h], heads.is_v, heads.is_v ? op.v_clip : op.k_clip, at, d);
    } else {
      T* to = reinterpret_cast<T*>(op.qkv) + row * op.qkv_stride + int64_t(heads.first + h) * d;
      for (int j = 0; j < kPairs; ++j)
        if (lane * 2 + j * 64 < d)
          *reinterpret_cast<typename Pair<T>::Type*>(to + lane * 2 + j * 64) = Pair<T>::from({head[h].v[j][0], head[h].v[j][1]});
    }
  }
}

const char* refuses(const RopeKV& op) {
  if (op.cache.bits != 16 && op.cache.bits != 8 && op.cache.bits != 4) return "writes a cache of 16, 8 or 4 bits";
  if (op.head_dim % 2 || op.head_dim > kDim) return "takes an even head_dim of up to 256";
  if (op.qkv_stride % 2 || op.cache.slot_stride % 2 || op.cache.head_stride % 2) return "a stride is odd";
  return nullptr;
}

void run(const RopeKV& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    const int64_t warps = (op.heads + kHeads - 1) / kHeads + 2 * ((op.kv_heads + kHeads - 1) / kHeads);
    launch(rope_kv_codes_kernel<T>, dim3(unsigned(op.m), unsigned((warps + kWarps - 1) / kWarps)), dim3(kWarps * 32), 0, stream, op);
  });
}

const Row<RopeKV> row{{"rope_kv_codes_sm80", Device::cuda, Arch::sm80, 1, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
