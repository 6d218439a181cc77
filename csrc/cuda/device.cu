// What the current GPU is, and why the kernels for an architecture cannot run on it.
#include <atomic>

#include "cuda/launch.cuh"
#include "dispatch.h"

namespace pe {

int compute_capability() {
  constexpr int kDevices = 64;  // asking CUDA costs a microsecond or two, every launch asks, so the answers are kept
  static std::atomic<int> known[kDevices];
  int device = 0;
  PE_CUDA(cudaGetDevice(&device));
  int capability = device < kDevices ? known[device].load(std::memory_order_relaxed) : 0;
  if (!capability) {
    int major = 0, minor = 0;
    PE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    PE_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    capability = major * 10 + minor;
    if (device < kDevices) known[device].store(capability, std::memory_order_relaxed);
  }
  return capability;
}

const char* missing_gpu(Arch arch) {
  static const std::string none = [] {  // drivers and GPUs do not appear while a process runs
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaSuccess && count > 0) return std::string();
    cudaGetLastError();
    return std::string("no CUDA device: ") + (error == cudaSuccess ? "none is visible" : cudaGetErrorString(error));
  }();
  if (!none.empty()) return none.c_str();
  const int capability = compute_capability();
  if (capability == 90) return nullptr;  // the module holds sm_90a code of every kernel
  if (arch == Arch::sm90a) return "this GPU is not of compute capability 9.0 (Hopper)";
  return capability / 10 == 8 ? nullptr : "this GPU is neither of compute capability 8.x nor 9.0, which the kernels are built for";
}

}  // namespace pe
