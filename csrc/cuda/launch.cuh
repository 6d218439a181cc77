// How a kernel is started: errors that throw, what the current GPU is, and launches that may overlap the kernel before them.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace pe {

inline void check_cuda(cudaError_t error, const char* call) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // an error that is not sticky would otherwise be reported again by the next launch
  throw std::runtime_error(std::string(call) + ": " + cudaGetErrorString(error));
}

// Throws std::runtime_error with the call and CUDA's text if `call` fails.
#define PE_CUDA(call) ::pe::check_cuda((call), #call)

// Compute capability of the calling thread's current GPU as major · 10 + minor. Throws if there is none.
int compute_capability();

// Bytes of shared memory that one block may have on it: 163 KiB on 8.0, 227 on 9.0, 99 on 8.6 and 8.9.
size_t shared_memory_limit();

// Its processors (SMs).
int processors();

// Starts kernel(args…) on `stream`. From Hopper on it may begin while the kernel before it ends: all of our kernels call
// dependency_wait() (ptx.cuh) before they touch anything that another kernel writes.
template <class... Params, class... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, void* stream, Args&&... args) {
  // More than 48 KiB a block must be asked for; asking is cheap and idempotent, so no state is kept.
  if (shared_bytes > 48 * 1024)
    PE_CUDA(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes)));
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid, config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes, config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap, config.numAttrs = compute_capability() >= 90 ? 1 : 0;
  PE_CUDA(cudaLaunchKernelEx(&config, kernel, static_cast<Params>(args)...));
  PE_CUDA(cudaGetLastError());
}

}  // namespace pe
