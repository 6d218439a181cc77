// One function per PTX instruction, the only place with inline PTX. What each does in hardware terms is said here once; a reader of a
// kernel needs no manual of PTX beside it.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace pe::ptx {

// The address of shared memory as the instructions below take it.
__device__ __forceinline__ uint32_t shared(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

// Waits until the kernels before this one in the stream have finished and their writes can be seen (griddepcontrol.wait). Before Hopper
// a kernel starts only then anyway.
__device__ __forceinline__ void dependency_wait() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel of the stream start once all blocks have come here (griddepcontrol.launch_dependents). It runs up to its own
// dependency_wait(), so calling this at once is safe and hides its launch and its first loads of weights.
__device__ __forceinline__ void dependency_release() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// (a & mask) | base in one instruction (lop3): written in C the compiler makes it two, for want of a second immediate.
__device__ __forceinline__ uint32_t and_or(uint32_t a, uint32_t mask, uint32_t base) {
  uint32_t d;
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "r"(mask), "r"(base));
  return d;
}

// Each half of the result is all ones if the half's topmost bit is set, else 0 (prmt, which __byte_perm() gives without this).
__device__ __forceinline__ uint32_t half_signs(uint32_t a) {
  uint32_t d;
  asm("prmt.b32 %0, %1, 0, 0xbb99;" : "=r"(d) : "r"(a));
  return d;
}

// Stores 16 bytes at once in global memory; an assignment may be compiled to four stores.
__device__ __forceinline__ void store16(void* to, uint4 v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}

// Asks for the 128 bytes around an address to be brought into L2.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }

// Copies 16 bytes from global to shared memory in the background, past L1: the first `bytes` from `from`, the rest zeros. With bytes = 0
// `from` is not read. Both ends 16-byte aligned.
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, int bytes = 16) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

// Closes a group of this thread's copies; a group may be empty.
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most `pending` of this thread's latest groups are under way. Other threads see the bytes after the next barrier.
template <int pending>
__device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Four matrices of 8 × 8 values of 16 bits from shared memory: lane i gives the address of row i%8 of matrix i/8, and gets of each
// matrix row lane/4, values 2(lane%4) and the next one.
__device__ __forceinline__ void load_matrices(uint32_t (&d)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(address)
               : "memory");
}

// d[16,8] += a[16,16] · b[16,8] over a warp, products exact, sums in f32. Lane 4g+t holds of a: rows (g, g+8, g, g+8) × columns
// (2t, 2t, 2t+8, 2t+8) and the next one each; of b: rows 2t and 2t+8 and the next one each, column g; of d: rows (g, g, g+8, g+8) ×
// columns (2t, 2t+1, 2t, 2t+1). The type of the first argument is that of a and b.
__device__ __forceinline__ void mma(__half, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mma(__nv_bfloat16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace pe::ptx
