// Kernels with bugs that need Hopper: a ring of TMA loads, a tensor store, wgmma with operands in shared memory and in registers, clusters with
// distributed shared memory and multicast, and grids that overlap. Their bugs are listed in test_mutants.py.
#include <cuda.h>

#include "mutants.cuh"

namespace {

__device__ __forceinline__ void barrier_init(uint64_t* b, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void barrier_arrive(uint64_t* b) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.shared::cta.b64 s, [%0];}" ::"r"(shared_address(b)) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* b, int bytes) {
  asm volatile("{.reg .b64 s; mbarrier.arrive.expect_tx.shared::cta.b64 s, [%0], %1;}" ::"r"(shared_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* b, int parity) {
  asm volatile("{.reg .pred p; W: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra W;}" ::"r"(shared_address(b)), "r"(parity)
               : "memory");
}

template <int rank>
__device__ __forceinline__ void tensor_load(void* dst, const CUtensorMap* map, uint64_t* b, const int (&x)[5]) {
  const uint32_t d = shared_address(dst), m = shared_address(b);
  if constexpr (rank == 1)
    asm volatile("cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3}], [%2];" ::"r"(d), "l"(map),
                 "r"(m), "r"(x[0])
                 : "memory");
  if constexpr (rank == 2)
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(d),
                 "l"(map), "r"(m), "r"(x[0]), "r"(x[1])
                 : "memory");
  if constexpr (rank == 3)
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(d),
                 "l"(map), "r"(m), "r"(x[0]), "r"(x[1]), "r"(x[2])
                 : "memory");
  if constexpr (rank == 4)
    asm volatile("cp.async.bulk.tensor.4d.shared::cta.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(d),
                 "l"(map), "r"(m), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  if constexpr (rank == 5)
    asm volatile(
        "{.reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0; "
        "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4, %5, %6, %7}], "
        "[%2], p;}" ::"r"(d),
        "l"(map), "r"(m), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(x[4])
        : "memory");
}
template <int rank>
__device__ __forceinline__ void tensor_store(const CUtensorMap* map, const void* src, const int (&x)[5]) {
  const uint32_t s = shared_address(src);
  if constexpr (rank == 1)
    asm volatile("cp.async.bulk.tensor.1d.global.shared::cta.bulk_group [%0, {%2}], [%1];" ::"l"(map), "r"(s), "r"(x[0]) : "memory");
  if constexpr (rank == 2)
    asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(map), "r"(s), "r"(x[0]), "r"(x[1])
                 : "memory");
  if constexpr (rank == 3)
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.bulk_group [%0, {%2, %3, %4}], [%1];" ::"l"(map), "r"(s), "r"(x[0]), "r"(x[1]),
                 "r"(x[2])
                 : "memory");
  if constexpr (rank == 4)
    asm volatile("cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%2, %3, %4, %5}], [%1];" ::"l"(map), "r"(s), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
  if constexpr (rank == 5)
    asm volatile(
        "{.reg .b64 p; createpolicy.fractional.L2::evict_first.b64 p, 1.0; "
        "cp.async.bulk.tensor.5d.global.shared::cta.bulk_group.L2::cache_hint [%0, {%2, %3, %4, %5, %6}], [%1], p;}" ::"l"(map),
        "r"(s), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]), "r"(x[4])
        : "memory");
}
__device__ __forceinline__ void store_done() { asm volatile("cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;" ::: "memory"); }

// One box of a tensor of `rank` dimensions to shared memory and from there to the other tensor.
template <int rank>
__global__ void copy_box(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int bytes, int start) {
  __shared__ alignas(1024) unsigned char s[8192];
  __shared__ uint64_t full;
  const int x[5] = {start, start, start, start, start};
  if (threadIdx.x == 0) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&from) : "memory");
    barrier_init(&full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    barrier_expect(&full, bytes);
    tensor_load<rank>(s, &from, &full, x);
    barrier_wait(&full, 0);
    tensor_store<rank>(&to, s, x);
    store_done();
  }
}

// y = x + 1 over rows of 64 floats: warp 0 loads boxes of 8 rows in a ring of two stages, 2 warps add, and the boxes are stored by TMA.
constexpr int kBox = 8 * 64;

template <int Bug>
__global__ void __launch_bounds__(96)
    tma_ring(const __grid_constant__ CUtensorMap from, const __grid_constant__ CUtensorMap to, int boxes) {
  extern __shared__ __align__(128) float ring[];  // two stages, two boxes on their way out
  __shared__ uint64_t full[2], empty[2];
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], Bug == 8 ? 63 : 64);
    if (Bug != 1) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  if (Bug != 9) __syncthreads();
  if (threadIdx.x < 32) {
    for (int i = 0; threadIdx.x == 0 && i < boxes; ++i) {
      if (i >= 2 && Bug != 4) barrier_wait(&empty[i % 2], i / 2 - 1 & 1);
      barrier_expect(&full[i % 2], kBox * 4 - (Bug == 2 ? 16 : 0));
      const int x[5] = {Bug == 5 ? i * 8 : 0, Bug == 5 ? 0 : i * 8};
      tensor_load<2>(ring + i % 2 * kBox + (Bug == 10 ? 16 : 0), &from, &full[i % 2], x);
    }
  } else {
    const int t = threadIdx.x - 32;
    for (int i = 0; i < boxes; ++i) {
      if (Bug != 3) barrier_wait(&full[i % 2], (i / 2 & 1) ^ (Bug == 7));
      float* out = ring + (2 + (Bug == 12 ? 0 : i % 2)) * kBox;
      for (int j = t; j < kBox; j += 64) out[j] = ring[i % 2 * kBox + j] + 1;
      barrier_arrive(&empty[i % 2]);
      if (Bug != 6) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
      asm volatile("bar.sync 1, 64;" ::: "memory");
      if (t == 0) {
        const int x[5] = {0, i * 8};
        tensor_store<2>(&to, out, x);
        asm volatile("cp.async.bulk.commit_group;" ::: "memory");
        asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(Bug == 11 || Bug == 12 ? 2 : 1) : "memory");
      }
      asm volatile("bar.sync 1, 64;" ::: "memory");
    }
    if (t == 0 && Bug != 11) store_done();
  }
}

// d[64, 8] = a[64, 16]·b[8, 16]ᵀ twice over with wgmma, operands stored by the threads.
template <int Bug>
__global__ void __launch_bounds__(128) wgmma_tile(const __half* a, const __half* b, float* d) {
  __shared__ alignas(1024) __half s[64 * 16 + 8 * 16];
  __half* sb = s + 64 * 16;
  const auto at = [](int row, int k) { return row / 8 * 128 + k / 8 * 64 + row % 8 * 8 + k % 8; };
  for (int i = threadIdx.x; i < 64 * 16; i += 128) s[at(i / 16, i % 16)] = a[i];
  sb[at(threadIdx.x / 16, threadIdx.x % 16)] = b[threadIdx.x];
  if (Bug != 1) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (Bug != 2) __syncthreads();
  float c[4] = {0, 0, 0, 0};
  for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[i])::"memory");
  if (Bug != 3) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
  if (Bug == 9) {
    c[0] = a[0];
    asm volatile("" : "+f"(c[0])::"memory");
  }
  const uint64_t strides = uint64_t(128 / 16) << 16 | uint64_t((Bug == 4 ? 128 : 256) / 16) << 32;
  const uint64_t da = (shared_address(s) >> 4 & 0x3fff) | strides, db = (shared_address(sb) >> 4 & 0x3fff) | strides;
  for (int i = 0; i < 2; ++i)
    asm volatile(
        "{.reg .pred p; setp.ne.u32 p, %6, 0; wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, p, 1, 1, 0, 0;}"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "l"(da), "l"(db), "r"(Bug == 5 ? 0 : i)
        : "memory");
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
  if (Bug == 6) s[threadIdx.x] = __half(0.0f);
  float early = Bug == 7 ? c[0] : 0;
  if (Bug == 7) asm volatile("" : "+f"(early)::"memory");
  if (Bug == 8)
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  else
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) asm volatile("" : "+f"(c[i])::"memory");
  if (Bug == 7) c[0] = early;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, col = threadIdx.x % 4 * 2;
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + col + i % 2] = c[i];
}

// d[64, 8] = a·b in i8, 32 inputs a step, with a in registers: a warp has the copy engine bring a step's a[64][32] and b[2][8][16] to a ring of
// two stages, and each of the others gives a stage back a step later, when the tensor cores have read it.
template <int Bug>
__global__ void __launch_bounds__(160) int8_ring(const int8_t* a, const int8_t* b, int* d, int steps) {
  __shared__ alignas(1024) int8_t sa[2][64 * 32], sb[2][8 * 32];
  __shared__ uint64_t full[2], empty[2];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, row = warp * 16 + lane / 4, t = lane % 4;
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2; ++i) barrier_init(&full[i], 1), barrier_init(&empty[i], Bug == 2 ? 1 : 4);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  __syncthreads();
  if (warp == 4) {
    const auto bring = [&](int8_t* to, const int8_t* from, int bytes, uint64_t* barrier) {
      asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from),
                   "r"(bytes), "r"(shared_address(barrier))
                   : "memory");
    };
    for (int i = 0; lane == 0 && i < steps; ++i) {
      if (i >= 2) barrier_wait(&empty[i % 2], i / 2 - 1 & 1);
      barrier_expect(&full[i % 2], 64 * 32 + 8 * 32);
      bring(sa[i % 2], a + i * 64 * 32, 64 * 32, &full[i % 2]), bring(sb[i % 2], b + i * 8 * 32, 8 * 32, &full[i % 2]);
    }
    return;
  }
  int c[4] = {0, 0, 0, 0};
  for (int i = 0; i < steps; ++i) {
    if (Bug != 1) barrier_wait(&full[i % 2], i / 2 & 1);
    const uint32_t* word = reinterpret_cast<const uint32_t*>(sa[i % 2]);
    uint32_t r[4] = {word[row * 8 + t], word[(row + 8) * 8 + t], word[row * 8 + 4 + t], word[(row + 8) * 8 + 4 + t]};
    for (uint32_t& v : r) asm volatile("" : "+r"(v)::"memory");
    if (Bug != 3) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    const uint64_t db = (shared_address(sb[i % 2]) >> 4 & 0x3fff) | uint64_t(128 / 16) << 16 | uint64_t(256 / 16) << 32;
    asm volatile(
        "{.reg .pred p; setp.eq.u32 p, 0, 0; wgmma.mma_async.sync.aligned.m64n8k32.s32.s8.s8 {%0, %1, %2, %3}, {%4, %5, %6, %7}, %8, p;}"
        : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
        : "r"(r[0]), "r"(r[Bug == 6 ? 2 : 1]), "r"(r[Bug == 6 ? 1 : 2]), "r"(r[3]), "l"(db)
        : "memory");
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
    if (i == 0 && Bug != 4) continue;
    if (Bug != 5) __syncwarp();
    if (lane == 0 && (Bug != 2 || warp == 0)) barrier_arrive(&empty[(Bug == 4 ? i : i - 1) % 2]);
  }
  if (Bug == 7)
    asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");
  else
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(c[i])::"memory");
  for (int i = 0; i < 4; ++i) d[(row + i / 2 * 8) * 8 + t * 2 + i % 2] = c[i];
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// Clusters of two: each block doubles 64 numbers in its shared memory and writes out those of the other one.
template <int Bug>
__global__ void __launch_bounds__(64) cluster_exchange(const float* x, float* y) {
  __shared__ float s[64];
  uint32_t rank;
  uint32_t peer;
  float v;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  s[threadIdx.x] = x[blockIdx.x * 64 + threadIdx.x] * 2;
  if (Bug == 4)
    asm volatile("barrier.cluster.arrive.relaxed.aligned; barrier.cluster.wait.aligned;" ::: "memory");
  else if (Bug == 5)
    __syncthreads();
  else if (Bug != 1)
    cluster_sync();
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;"
               : "=r"(peer)
               : "r"(shared_address(s + 63 - threadIdx.x)), "r"(Bug == 3 ? rank : rank ^ 1));
  asm volatile("ld.shared::cluster.f32 %0, [%1];" : "=f"(v) : "r"(peer) : "memory");
  y[blockIdx.x * 64 + threadIdx.x] = v;
  if (Bug != 2) cluster_sync();
}

// Clusters of two: block 0 loads 256 bytes for both of them.
template <int Bug>
__global__ void __launch_bounds__(64) multicast(const float* x, float* y) {
  __shared__ alignas(128) float s[64];
  __shared__ uint64_t full;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (Bug != 2) barrier_expect(&full, 256);
  }
  if (Bug == 3)
    __syncthreads();
  else
    cluster_sync();
  if (rank == 0 && threadIdx.x == 0) {
    const short mask = Bug == 1 ? 1 : 3;
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], 256, [%2], %3;" ::"r"(
                     shared_address(s)),
                 "l"(x + blockIdx.x / 2 * 64), "r"(shared_address(&full)), "h"(mask)
                 : "memory");
  }
  if (Bug != 4) barrier_wait(&full, 0);
  y[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];
  cluster_sync();
}

// The same with a tensor map: block 0 loads a box of 64 floats for both.
__global__ void __launch_bounds__(64) multicast_box(const __grid_constant__ CUtensorMap from, float* y) {
  __shared__ alignas(128) float s[64];
  __shared__ uint64_t full;
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  if (threadIdx.x == 0) {
    barrier_init(&full, 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    barrier_expect(&full, 256);
  }
  cluster_sync();
  if (rank == 0 && threadIdx.x == 0)
    asm volatile(
        "cp.async.bulk.tensor.1d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4}], [%2], %3;" ::"r"(
            shared_address(s)),
        "l"(&from), "r"(shared_address(&full)), "h"(short(3)), "r"(int(blockIdx.x / 2 * 64))
        : "memory");
  barrier_wait(&full, 0);
  y[blockIdx.x * 64 + threadIdx.x] = s[threadIdx.x];
  cluster_sync();
}

// Two kernels that may overlap: the second reads what the first has written.
__global__ void first_grid(const float* x, float* between) {
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
  asm volatile("griddepcontrol.wait;" ::: "memory");
  between[threadIdx.x] = x[threadIdx.x] + 1;
}
template <int Bug>
__global__ void second_grid(const float* between, float* y) {
  float early = 0;
  if (Bug == 2) early = between[threadIdx.x];
  if (Bug == 3) const_cast<float*>(between)[threadIdx.x] = 0;
  if (Bug != 1) asm volatile("griddepcontrol.wait;" ::: "memory");
  y[threadIdx.x] = Bug == 2 ? early * 2 : between[threadIdx.x] * 2;
}

// A tensor of 4-byte elements, each dimension of `size`, with boxes of `box`.
CUtensorMap tensor_map(const void* data, int rank, const int* size, const int* box) {
  using Encode = decltype(&cuTensorMapEncodeTiled);
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  CUtensorMap map{};
  cuuint64_t sizes[5], strides[4], stride = 4;
  cuuint32_t boxes[5], ones[5] = {1, 1, 1, 1, 1};
  for (int i = 0; i < rank; ++i) {
    sizes[i] = size[i], boxes[i] = box[i];
    if (i) strides[i - 1] = stride;
    stride *= size[i];
  }
  if (function)
    reinterpret_cast<Encode>(function)(&map, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, rank, const_cast<void*>(data), sizes, strides, boxes, ones,
                                       CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                                       CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return map;
}

template <class... P, class... A>
void start(void (*kernel)(P...), int blocks, int threads, int bytes, int cluster, bool overlaps, cudaStream_t stream, A... args) {
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = cluster, attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks, config.blockDim = threads, config.dynamicSmemBytes = bytes, config.stream = stream;
  config.attrs = attributes + (cluster > 1 ? 0 : 1), config.numAttrs = (cluster > 1) + overlaps;
  cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...);
}

}  // namespace

MUTANT_EXPORT int run_copy_box(int rank, const float* x, float* y, int start_at, cudaStream_t stream) {
  const int size[5] = {20, 7, 5, 4, 3}, box[5] = {8, 4, 3, 2, 2};
  int bytes = 4;
  for (int i = 0; i < rank; ++i) bytes *= box[i];
  const CUtensorMap from = tensor_map(x, rank, size, box), to = tensor_map(y, rank, size, box);
  with_bug<6>(rank, [&](auto r) {
    if constexpr (r.value > 0) copy_box<r.value><<<1, 32, 0, stream>>>(from, to, bytes, start_at);
  });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_tma_ring(int bug, const float* x, float* y, int rows, cudaStream_t stream) {
  const int size[2] = {64, rows}, box[2] = {64, 8};
  const CUtensorMap from = tensor_map(x, 2, size, box), to = tensor_map(y, 2, size, box);
  with_bug<13>(bug, [&](auto b) { tma_ring<b.value><<<1, 96, 4 * kBox * 4, stream>>>(from, to, (rows + 7) / 8); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_wgmma_tile(int bug, const __half* a, const __half* b, float* d, cudaStream_t stream) {
  with_bug<10>(bug, [&](auto v) { wgmma_tile<v.value><<<1, 128, 0, stream>>>(a, b, d); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_int8_ring(int bug, const int8_t* a, const int8_t* b, int* d, int steps, cudaStream_t stream) {
  with_bug<8>(bug, [&](auto v) { int8_ring<v.value><<<1, 160, 0, stream>>>(a, b, d, steps); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_cluster_exchange(int bug, const float* x, float* y, int blocks, cudaStream_t stream) {
  with_bug<6>(bug == 6 ? 0 : bug, [&](auto b) { start(cluster_exchange<b.value>, blocks + (bug == 6), 64, 0, 2, false, stream, x, y); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_multicast(int bug, const float* x, float* y, int blocks, cudaStream_t stream) {
  with_bug<5>(bug, [&](auto b) { start(multicast<b.value>, blocks, 64, 0, 2, false, stream, x, y); });
  return cudaGetLastError();
}
MUTANT_EXPORT int run_multicast_box(const float* x, float* y, int blocks, cudaStream_t stream) {
  const int size[1] = {blocks / 2 * 64}, box[1] = {64};
  start(multicast_box, blocks, 64, 0, 2, false, stream, tensor_map(x, 1, size, box), y);
  return cudaGetLastError();
}
MUTANT_EXPORT int run_overlapping_grids(int bug, const float* x, float* between, float* y, cudaStream_t other, cudaStream_t stream) {
  start(first_grid, 1, 64, 0, 1, true, stream, x, between);
  with_bug<4>(bug == 4 ? 0 : bug, [&](auto b) { start(second_grid<b.value>, 1, 64, 0, 1, true, bug == 4 ? other : stream, between, y); });
  return cudaGetLastError();
}
