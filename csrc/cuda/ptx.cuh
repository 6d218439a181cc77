// One function per PTX instruction, the only place with inline PTX. What each does in hardware terms is said here once; a reader of a
// kernel needs no manual of PTX beside it.
#pragma once

#include <cstdint>

namespace pe::ptx {

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

}  // namespace pe::ptx
