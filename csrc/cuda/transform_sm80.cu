// The Kronecker transform of a site and its activations' quantization, for factors of any size: RMSNorm or SiLU·mul before it, and
// activations or codes with a scale a token after it, in one pass over memory.
//
// A block has both factors in shared memory and takes tokens in turn, several at a time where they are small. Each product goes by tiles of
// 16 rows × 64 columns, a warp's, on the f16 or bf16 tensor cores: u = mat(v)·right, rounded to dtype, then t = leftᵀ·u, kept in f32 over the v
// that is no longer needed, until the largest of the token is known. Where that does not fit, the factors are read from L2 and t is rounded to
// dtype. Without factors a token stands there as t from the beginning.
//
// Rows in shared memory are 16 bytes longer than an even number of 16-byte pieces, so that 8 rows' pieces of one column lie in different banks.
#include <algorithm>

#include "cuda/launch.cuh"
#include "cuda/token_codes.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32;
constexpr int kColumns = 4;  // of 16, a warp's share of a row of tiles: 32 sums a lane

int64_t round_up(int64_t v, int64_t step) { return (v + step - 1) / step * step; }

// The sizes in shared memory: factors padded to 16 with zeros, rows 8 values longer. Without factors there is neither padding nor u.
struct Sizes {
  bool plain;               // no factors
  int a, b, left_row, row;  // padded; values from a row to the next, of left and of everything else
  int together;             // tokens at a time
  bool resident;            // the factors are in shared memory, and t is f32

  Sizes(const Transform& op, int together, bool resident)
      : plain(!op.left && !op.right), a(int(round_up(op.a, plain ? 1 : 16))), b(int(round_up(op.b, plain ? 1 : 16))), left_row(a + 8),
        row(b + 8), together(together), resident(resident) {}
  __host__ __device__ int left_size(const Transform& op) const { return resident && op.left ? a * left_row : 0; }
  __host__ __device__ int right_size(const Transform& op) const { return resident && op.right ? b * row : 0; }
  __host__ __device__ int token_size() const { return a * row; }
  __host__ __device__ int u_size() const { return plain ? 0 : token_size(); }
  size_t bytes(const Transform& op) const {
    return size_t(left_size(op) + right_size(op)) * 2 + size_t(together) * (u_size() * 2 + token_size() * (resident ? 4 : 2));
  }
};

template <class F>
__device__ Range over_block(Range v, F add) {
  __shared__ Range part[kWarps];
  for (int step = 16; step > 0; step /= 2) {
    Range other;
    other.high = __shfl_xor_sync(0xffffffffu, v.high, step), other.low = __shfl_xor_sync(0xffffffffu, v.low, step);
    add(v, other);
  }
  if (threadIdx.x % 32 == 0) part[threadIdx.x / 32] = v;
  __syncthreads();
  v = part[0];
  for (int w = 1; w < kWarps; ++w) add(v, part[w]);
  __syncthreads();  // the next call writes there
  return v;
}

// A factor, in shared memory or where it came from.
template <class T, bool resident>
struct Factor {
  const __half* from;
  T* shared;
  int size, row;

  __device__ void load(int padded) {
    if constexpr (resident) {
      for (int i = threadIdx.x; from && i < padded * padded; i += kThreads) {
        const int r = i / padded, c = i % padded;
        shared[r * row + c] = r < size && c < size ? T(float(from[r * size + c])) : T(0.0f);
      }
    }
  }
  __device__ uint32_t pair(int r, int c) const {  // and the one below it
    const float first = r < size && c < size ? float(from[r * size + c]) : 0.0f;
    const float second = r + 1 < size && c < size ? float(from[(r + 1) * size + c]) : 0.0f;
    return bits_of(Pair<T>::from({first, second}));
  }
  // Its 16 × 16 values from (r, c) on, transposed: quarters (0, 0), (8, 0), (0, 8), (8, 8).
  __device__ void operand(uint32_t (&d)[4], int r, int c) const {
    const int lane = threadIdx.x % 32;
    if constexpr (resident) {
      ptx::load_matrices_transposed(d, ptx::shared(shared + (r + lane % 16) * row + c + lane / 16 * 8));
    } else {
      for (int i = 0; i < 4; ++i) d[i] = pair(r + i % 2 * 8 + lane % 4 * 2, c + i / 2 * 8 + lane / 4);
    }
  }
};

template <class T, bool resident>
struct Block {
  using Wide = std::conditional_t<resident, float, T>;  // t

  const Transform& op;
  const Sizes& sizes;
  Factor<T, resident> left, right;
  T *u, *v;
  Wide* t;
  int warp, lane;

  __device__ Block(const Transform& op, const Sizes& sizes, unsigned char* memory) : op(op), sizes(sizes) {
    T* at = reinterpret_cast<T*>(memory);
    left = {static_cast<const __half*>(op.left), at, int(op.a), sizes.left_row}, at += sizes.left_size(op);
    right = {static_cast<const __half*>(op.right), at, int(op.b), sizes.row}, at += sizes.right_size(op);
    u = at, at += sizes.together * sizes.u_size();
    t = reinterpret_cast<Wide*>(at);
    v = left.from && right.from ? at : u;  // t may lie over v, except where it is made of v at once
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  }

  // Calls f(place, i) for the eight values from `at` on of a token: where each lies.
  template <class F>
  __device__ void each(int at, F f) const {
    int r = at / int(op.b), c = at % int(op.b);
    for (int i = 0; i < 8; ++i) {
      f(r * sizes.row + c, i);
      if (++c == op.b) c = 0, ++r;
    }
  }
  template <class To>
  __device__ void put(To* to, int at, float (&values)[8]) const {
    if constexpr (std::is_same_v<To, T>) {
      if (op.b % 8 == 0) {
        uint32_t word[4];
        for (int i = 0; i < 4; ++i) word[i] = bits_of(Pair<T>::from({values[2 * i], values[2 * i + 1]}));
        *reinterpret_cast<uint4*>(to + at / int(op.b) * sizes.row + at % int(op.b)) = make_uint4(word[0], word[1], word[2], word[3]);
        return;
      }
    }
    each(at, [&](int place, int i) { to[place] = To(values[i]); });
  }
  __device__ void get(const Wide* from, int at, float (&values)[8]) const {
    if (op.b % 8 == 0)
      load8(from + at / int(op.b) * sizes.row + at % int(op.b), values);
    else
      each(at, [&](int place, int i) { values[i] = float(from[place]); });
  }

  // A token's v, for the first product, or as t where there is none.
  __device__ void read(int64_t token, int slot) {
    const T* row = reinterpret_cast<const T*>(op.x) + token * op.x_stride;
    float factor = 1;
    if (op.weight) {
      Range sum;  // of squares, in its first half
      for (int at = threadIdx.x * 8; at < op.n; at += kThreads * 8) {
        float values[8];
        load8(row + at, values);
        for (int i = 0; i < 8; ++i) sum.high += values[i] * values[i];
      }
      factor = rsqrtf(over_block(sum, [](Range& a, Range b) { a.high += b.high; }).high / float(op.n) + op.eps);
    }
    const int base = slot * sizes.token_size();
    for (int at = threadIdx.x * 8; at < op.n; at += kThreads * 8) {
      float values[8];
      read_v(op, row, at, factor, values);
      left.from || right.from ? put(v + base, at, values) : put(t + base, at, values);
    }
    // What pads v up to 16: another token's t may lie there.
    if (sizes.a != op.a || sizes.b != op.b)
      for (int i = threadIdx.x; i < sizes.a * sizes.b; i += kThreads)
        if (i / sizes.b >= op.a || i % sizes.b >= op.b) v[base + i / sizes.b * sizes.row + i % sizes.b] = T(0.0f);
  }

  // to = from · right, or leftᵀ · from: tiles of 16 rows × 64 columns, a warp each.
  template <bool with_left, class To>
  __device__ void product(const T* from, To* to, int tokens) const {
    const int bands = sizes.a / 16, parts = (sizes.b + 16 * kColumns - 1) / (16 * kColumns);
    for (int unit = warp; unit < tokens * bands * parts; unit += kWarps) {
      const int base = unit / (bands * parts) * sizes.token_size(), r = unit / parts % bands * 16, c = unit % parts * 16 * kColumns;
      float sum[kColumns][2][4] = {};
      for (int k = 0; k < (with_left ? sizes.a : sizes.b); k += 16) {
        uint32_t a[4], b[4];
        if constexpr (with_left) {
          left.operand(b, k, r);
          a[0] = b[0], a[1] = b[2], a[2] = b[1], a[3] = b[3];
        } else {
          ptx::load_matrices(a, ptx::shared(from + base + (r + lane % 16) * sizes.row + k + lane / 16 * 8));
        }
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (c + j * 16 >= sizes.b) continue;
          if constexpr (with_left)
            ptx::load_matrices_transposed(b, ptx::shared(from + base + (k + lane % 16) * sizes.row + c + j * 16 + lane / 16 * 8));
          else
            right.operand(b, k, c + j * 16);
          for (int i = 0; i < 2; ++i) ptx::mma(T(), sum[j][i], a, b[2 * i], b[2 * i + 1]);
        }
      }
      for (int j = 0; j < kColumns; ++j)
        for (int i = 0; i < 4 && c + j * 16 < sizes.b; ++i)
          put_pair(to + base + (r + lane / 4 + i % 2 * 8) * sizes.row + c + j * 16 + i / 2 * 8 + lane % 4 * 2,
                   {sum[j][i / 2][i % 2 * 2], sum[j][i / 2][i % 2 * 2 + 1]});
    }
  }
  static __device__ void put_pair(float* to, float2 v) { *reinterpret_cast<float2*>(to) = v; }
  static __device__ void put_pair(T* to, float2 v) { *reinterpret_cast<typename Pair<T>::Type*>(to) = Pair<T>::from(v); }

  __device__ void write(int64_t token, int slot) const {
    const Wide* from = t + slot * sizes.token_size();
    float values[8];
    if (op.y)
      for (int at = threadIdx.x * 8; at < op.n; at += kThreads * 8) {
        get(from, at, values);
        store8(reinterpret_cast<T*>(op.y) + token * op.y_stride + at, values);
      }
    if (!op.code) return;
    Range range;
    for (int at = threadIdx.x * 8; at < op.n; at += kThreads * 8) {
      get(from, at, values);
      for (int i = 0; i < 8; ++i) range.add(values[i]);
    }
    const Quantizer quantizer(op.bits, op.clip, over_block(range, [](Range& a, Range b) { a.add(b); }));
    if (threadIdx.x == 0) op.scale[token] = quantizer.scale;
    for (int at = threadIdx.x * 8; at < op.n; at += kThreads * 8) {
      get(from, at, values);
      uint32_t word[2] = {};
      for (int i = 0; i < 8; ++i) {
        const uint32_t code = quantizer.code(values[i]);
        op.bits == 8 ? word[i / 4] |= (code & 255) << (i % 4 * 8) : word[0] |= (code & 15) << (i * 4);
      }
      char* to = static_cast<char*>(op.code) + (token * op.n + at) * op.bits / 8;
      if (op.bits == 8)
        *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
      else
        *reinterpret_cast<uint32_t*>(to) = word[0];
    }
  }
};

template <class T, bool resident>
__global__ void __launch_bounds__(kThreads)
transform_kernel(const __grid_constant__ Transform op, const __grid_constant__ Sizes sizes) {
  extern __shared__ __align__(16) unsigned char memory[];
  ptx::dependency_release();
  Block<T, resident> block(op, sizes, memory);
  block.left.load(sizes.a), block.right.load(sizes.b);
  ptx::dependency_wait();  // factors are nobody's output, x is
  for (int64_t first = int64_t(blockIdx.x) * sizes.together; first < op.m; first += int64_t(gridDim.x) * sizes.together) {
    const int tokens = int(min(int64_t(sizes.together), op.m - first));
    for (int i = 0; i < tokens; ++i) block.read(first + i, i);
    __syncthreads();
    if (op.right) {
      op.left ? block.template product<false>(block.v, block.u, tokens) : block.template product<false>(block.v, block.t, tokens);
      __syncthreads();
    }
    if (op.left) {
      block.template product<true>(block.u, block.t, tokens);
      __syncthreads();
    }
    for (int i = 0; i < tokens; ++i) block.write(first + i, i);
    __syncthreads();  // the next tokens come where these were
  }
}

// The first of the ways above whose memory this GPU has; together = 0: none.
Sizes sizes_of(const Transform& op) {
  const size_t limit = shared_memory_limit() - 256;  // and what the kernel has by itself
  for (const bool resident : {true, false}) {
    Sizes sizes(op, 1, resident);
    if (sizes.bytes(op) > limit) continue;
    const int tiles = sizes.plain ? kWarps : sizes.a / 16 * ((sizes.b + 16 * kColumns - 1) / (16 * kColumns));
    for (Sizes more = sizes; more.bytes(op) <= limit; more.together *= 2) {
      sizes = more;
      if (sizes.together * tiles >= kWarps || sizes.together >= op.m) break;
    }
    return sizes;
  }
  return Sizes(op, 0, false);
}

const char* refuses(const Transform& op) {
  if (const char* why = refuses_transform(op)) return why;
  return sizes_of(op).together ? nullptr : "a token does not fit into this GPU's shared memory";
}

template <class T, bool resident>
void start(const Transform& op, const Sizes& sizes, void* stream) {
  const int64_t blocks = std::min<int64_t>((op.m + sizes.together - 1) / sizes.together, 2 * processors());
  launch(transform_kernel<T, resident>, dim3(unsigned(blocks)), dim3(kThreads), sizes.bytes(op), stream, op, sizes);
}

void run(const Transform& op, void* stream) {
  if (op.m == 0) return;
  const Sizes sizes = sizes_of(op);
  with_type(op.dtype, [&]<class T>(const T*) {
    sizes.resident ? start<T, true>(op, sizes, stream) : start<T, false>(op, sizes, stream);
  });
}

const Row<Transform> row{{"transform_sm80", Device::cuda, Arch::sm80, 1, Layout::canonical, refuses, run}};

}  // namespace
}  // namespace pe
