// Attention of few rows over a cache of 16, 8 or 4 bits: decoding. It is right for any number of rows, but reads the keys anew for each.
//
// A block takes one row, up to 16 query heads that share a key head, so that each key is read once for all of them, and every n-th 64 keys; a
// warp 16 of those at a time. Q·Kᵀ and P·V are tensor-core products with heads as rows, and keys and values come straight from memory into
// the operands: which element is which k of the first product, and which column of the second, is free, so a lane takes eight neighbouring
// ones. Codes are multiplied as whole numbers; a key's scale comes to its scores, a value's to the weights, relative to the largest so far.
// q is taken in f16: bf16 queries must stay below 65504.
//
// At the end the warps' shares are added in a fixed order, and so are those of blocks that share a row, by the last of them to come.
#include "attention_parts.h"
#include "cuda/cached.cuh"
#include "cuda/launch.cuh"
#include "cuda/layout_mma.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kWarps = 4, kHeads = parts::kHeads;
static_assert(kWarps * 16 == parts::kKeys);

// What a warp, and then a block, knows of some keys.
template <int C>
struct Share {
  float out[kHeads][64 * C];
  float top[kHeads], sum[kHeads];
};

// Where a block's row and heads are.
struct Place {
  int row, kv_head, head, heads;  // the first query head, and how many of them are the block's
  int64_t base, scale_base;       // of its keys and values, in elements, and of their scales
  int last;                       // the last key that the row sees

  __device__ explicit Place(const Attention& op) {
    const int share = int(op.heads / op.kv_heads), blocks = (share + kHeads - 1) / kHeads, part = blockIdx.y % blocks;
    row = blockIdx.z, kv_head = blockIdx.y / blocks;
    head = kv_head * share + part * kHeads, heads = min(kHeads, share - part * kHeads);
    base = op.slot[row] * op.cache.slot_stride + kv_head * op.cache.head_stride, scale_base = base / op.head_dim;
    last = op.position[row];
  }
};

__device__ __forceinline__ void load_row(const Attention& op, int64_t at, float (&v)[8]) {
  if (op.dtype == Dtype::f16)
    load8(reinterpret_cast<const __half*>(op.q) + at, v);
  else
    load8(reinterpret_cast<const __nv_bfloat16*>(op.q) + at, v);
}

__device__ __forceinline__ float over_quad(float v, bool largest) {
  for (int step = 1; step <= 2; step *= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, v, step);
    v = largest ? fmaxf(v, other) : v + other;
  }
  return v;
}

template <int bits, int C>  // C: 64 elements of a head
struct Warp {
  using Elements = Eight<bits>;

  const Attention& op;
  const Place& place;
  int lane, g, t, d;
  uint32_t q[2 * C][2][4];        // row operands: of 32 elements the lane has those from 8t on, four a step
  float out[C][8][4] = {};        // head g or g+8; element 64c + 16t + 8·(column % 2) + j
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {}, largest = 0;  // of scores; of weights, the lane's; of values' scales

  __device__ Warp(const Attention& op, const Place& place) : op(op), place(place) {
    lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, d = int(op.head_dim);
    for (int c = 0; c < 2 * C; ++c)
      for (int high = 0; high < 2; ++high) {
        float v[8] = {};
        const int head = g + high * 8, at = c * 32 + t * 8;
        if (head < place.heads && at < d) load_row(op, place.row * op.q_stride + int64_t(place.head + head) * d + at, v);
        for (int p = 0; p < 4; ++p) q[c][p / 2][p % 2 * 2 + high] = bits_of(__floats2half2_rn(v[Elements::first(p)], v[Elements::second(p)]));
      }
  }

  // Scores of 16 keys from `key` on; lane's are those of heads g, g+8 by keys 2t, 2t+1 and 8 further.
  __device__ void scores(int key, float (&s)[2][4]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int mine = min(key + i * 8 + g, place.last);  // beyond the last one that one again: it weighs nothing
      const __half2 zero = Elements::zeros(op.cache.k_zero, place.scale_base + mine, place.scale_base + mine);
#pragma unroll
      for (int c = 0; c < 2 * C; ++c) {
        const int at = c * 32 + t * 8;
        if (c * 32 >= d) continue;
        const Elements k(op.cache.k, place.base + int64_t(mine) * d + at, at < d);
        for (int step = 0; step < 2; ++step) ptx::mma(__half(), s[i], q[c][step], k.pair(2 * step, zero), k.pair(2 * step + 1, zero));
      }
    }
  }

  __device__ void add(int key) {
    float s[2][4] = {}, factor[2][2], value_scale[2][2] = {};
    int64_t at[2][2];  // the lane's keys, among all
    scores(key, s);
    float most = 0;
    for (int i = 0; i < 2; ++i)
      for (int e = 0; e < 2; ++e) {
        const int mine = key + i * 8 + 2 * t + e;
        at[i][e] = place.scale_base + min(mine, place.last);
        factor[i][e] = op.scale * 1.44269504f * (bits == 16 ? 1.0f : op.cache.k_scale[at[i][e]]);  // powers of 2
        if (bits < 16) value_scale[i][e] = op.cache.v_scale[at[i][e]], most = fmaxf(most, value_scale[i][e]);
        for (int high = 0; high < 2; ++high) {
          float& score = s[i][2 * high + e];
          score = mine <= place.last ? score * factor[i][e] : -INFINITY;
        }
      }
    const float before = largest;
    if (bits < 16) largest = fmaxf(largest, over_quad(most, true));
    const float to_weight = largest > 0 ? 1 / largest : 0, moved = bits == 16 ? 1.0f : before * to_weight;
    uint32_t p[4];
    for (int high = 0; high < 2; ++high) {
      const float peak = fmaxf(fmaxf(s[0][2 * high], s[0][2 * high + 1]), fmaxf(s[1][2 * high], s[1][2 * high + 1]));
      const float now = fmaxf(top[high], over_quad(peak, true)), fade = exp2f(top[high] - now);
      top[high] = now, sum[high] *= fade;
      for (int i = 0; i < 2; ++i) {
        float w[2];
        for (int e = 0; e < 2; ++e) {
          w[e] = exp2f(s[i][2 * high + e] - now);
          sum[high] += w[e];
          if (bits < 16) w[e] *= value_scale[i][e] * to_weight;
        }
        p[2 * i + high] = bits_of(__floats2half2_rn(w[0], w[1]));
      }
      for (int c = 0; c < C; ++c)
        for (int j = 0; j < 8; ++j)
          for (int e = 0; e < 2; ++e) out[c][j][2 * high + e] *= fade * moved;
    }
    add_values(at, p);
  }

  __device__ void add_values(const int64_t (&at)[2][2], const uint32_t (&p)[4]) {
    const __half2 zero[2] = {Elements::zeros(op.cache.v_zero, at[0][0], at[0][1]), Elements::zeros(op.cache.v_zero, at[1][0], at[1][1])};
#pragma unroll
    for (int c = 0; c < C; ++c) {
      const int element = c * 64 + g * 8;
      if (c * 64 >= d) continue;
      auto value = [&](int i, int e) { return Elements(op.cache.v, at[i][e] * d + element, element < d); };
      const Elements v[2][2] = {{value(0, 0), value(0, 1)}, {value(1, 0), value(1, 1)}};
#pragma unroll
      for (int j = 0; j < 8; ++j)
        ptx::mma(__half(), out[c][j], p, Elements::both(v[0][0], v[0][1], j, zero[0]), Elements::both(v[1][0], v[1][1], j, zero[1]));
    }
  }

  __device__ void finish(Share<C>& to) {
    for (int high = 0; high < 2; ++high) {
      const int head = g + high * 8;
      const float total = over_quad(sum[high], false);
      if (t == 0) to.top[head] = top[high], to.sum[head] = total;
      for (int c = 0; c < C; ++c)
        for (int j = 0; j < 8; ++j)
          for (int e = 0; e < 2; ++e) to.out[head][c * 64 + t * 16 + e * 8 + j] = out[c][j][2 * high + e] * (bits == 16 ? 1.0f : largest);
    }
  }
};

// Eight elements of a head from all shares, and the sum of weights, relative to the largest score of all.
template <class At>
__device__ void add_shares(int shares, int head, int element, At at, float (&v)[8], float& top, float& sum) {
  top = -INFINITY, sum = 0;
  for (int i = 0; i < shares; ++i) top = fmaxf(top, *at(i).top(head));
  for (float& x : v) x = 0;
  for (int i = 0; i < shares; ++i) {
    const auto share = at(i);
    const float fade = exp2f(*share.top(head) - top);
    float part[8];
    load8(share.out(head) + element, part);
    for (int j = 0; j < 8; ++j) v[j] += part[j] * fade;
    sum += *share.sum(head) * fade;
  }
}

// A share wherever it lies.
struct View {
  float* base;
  int d;
  __device__ float* out(int head) const { return base + head * d; }
  __device__ float* top(int head) const { return base + kHeads * d + head; }
  __device__ float* sum(int head) const { return top(head) + kHeads; }
};

__device__ void store_y(const Attention& op, const Place& place, int head, int element, float (&v)[8], float sum) {
  const float inverse = 1 / sum;
  for (float& x : v) x *= inverse;
  const int64_t at = place.row * op.y_stride + int64_t(place.head + head) * op.head_dim + element;
  if (op.dtype == Dtype::f16)
    store8(reinterpret_cast<__half*>(op.y) + at, v);
  else
    store8(reinterpret_cast<__nv_bfloat16*>(op.y) + at, v);
}

template <int bits, int C>
__global__ void __launch_bounds__(kWarps * 32)
attention_kernel(const __grid_constant__ Attention op, float* shares, int share_floats, uint32_t* counter) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto* mine = reinterpret_cast<Share<C>*>(memory);
  ptx::dependency_release();
  ptx::dependency_wait();
  const Place place(op);
  const int steps = place.last / parts::kKeys + 1, live = min(int(gridDim.x), steps), warp = threadIdx.x / 32;
  if (int(blockIdx.x) >= live) return;
  Warp<bits, C> keys(op, place);
  for (int step = blockIdx.x; step < steps; step += gridDim.x) {
    const int key = step * parts::kKeys + warp * 16;
    if (key <= place.last) keys.add(key);
  }
  keys.finish(mine[warp]);
  __syncthreads();
  const int pieces = int(op.head_dim) / 8, count = place.heads * pieces;
  const int64_t tile = int64_t(blockIdx.z) * gridDim.y + blockIdx.y;
  auto shared = [&](int i) { return View{mine[i].out[0], 64 * C}; };
  auto global = [&](int i) { return View{shares + (tile * gridDim.x + i) * share_floats, int(op.head_dim)}; };
  float v[8], top, sum;
  for (int i = threadIdx.x; i < count; i += kWarps * 32) {
    const int head = i / pieces, element = i % pieces * 8;
    add_shares(kWarps, head, element, shared, v, top, sum);
    if (live == 1) {
      store_y(op, place, head, element, v, sum);
      continue;
    }
    const View to = global(blockIdx.x);
    for (int half = 0; half < 2; ++half)
      *reinterpret_cast<float4*>(to.out(head) + element + half * 4) = make_float4(v[4 * half], v[4 * half + 1], v[4 * half + 2], v[4 * half + 3]);
    if (element == 0) *to.top(head) = top, *to.sum(head) = sum;
  }
  if (live == 1 || !last_to_come(counter + tile, live)) return;
  for (int i = threadIdx.x; i < count; i += kWarps * 32) {
    add_shares(live, i / pieces, i % pieces * 8, global, v, top, sum);
    store_y(op, place, i / pieces, i % pieces * 8, v, sum);
  }
}

const char* refuses(const Attention& op) {
  if (op.head_dim < 8 || op.head_dim % 8 || op.head_dim > 128) return "takes a head_dim of 8 to 128, a multiple of 8";
  if (op.kv_heads < 1 || op.heads % op.kv_heads) return "heads is no multiple of kv_heads";
  if (op.m > 65535) return "takes up to 65535 rows";
  if (op.cache.bits != 16 && op.cache.bits != 8 && op.cache.bits != 4) return "reads a cache of 16, 8 or 4 bits";
  if (op.q_stride % 8 || op.y_stride % 8 || op.cache.slot_stride % 8 || op.cache.head_stride % 8) return "a stride is no multiple of 8";
  for (const void* p : {static_cast<const void*>(op.q), static_cast<const void*>(op.y), static_cast<const void*>(op.cache.k),
                        static_cast<const void*>(op.cache.v)})
    if (!aligned16(p)) return "a pointer is not 16-byte aligned";
  return nullptr;
}

template <int bits, int C>
void start(const Attention& op, void* stream) {
  const dim3 grid(unsigned(parts::key_blocks(op)), unsigned(parts::head_blocks(op)), unsigned(op.m));
  char* workspace = static_cast<char*>(op.workspace);
  launch(attention_kernel<bits, C>, grid, dim3(kWarps * 32), kWarps * sizeof(Share<C>), stream, op,
         reinterpret_cast<float*>(workspace + mma::kCounterBytes), int(parts::share_floats(op)), reinterpret_cast<uint32_t*>(workspace));
}

void run(const Attention& op, void* stream) {
  if (op.m == 0) return;
  auto of_bits = [&]<int bits>() {
    op.head_dim <= 64 ? start<bits, 1>(op, stream) : start<bits, 2>(op, stream);
  };
  switch (op.cache.bits) {
    case 16: return of_bits.template operator()<16>();
    case 8: return of_bits.template operator()<8>();
    default: return of_bits.template operator()<4>();
  }
}

const Row<Attention> row{{"attention_sm80", Device::cuda, Arch::sm80, 1, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
