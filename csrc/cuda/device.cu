// What the current GPU is, why the kernels for an architecture cannot run on it, and the workspaces of its streams.
#include <algorithm>
#include <atomic>
#include <map>
#include <tuple>

#include "cuda/launch.cuh"
#include "dispatch.h"

namespace pe {

namespace {

struct Known {
  std::atomic<int> capability = 0, shared = 0, processors = 0;
};

// Asking CUDA costs a microsecond or two and every launch asks, so the answers are kept.
const Known& current() {
  constexpr int kDevices = 64;
  static Known known[kDevices];
  int device = 0;
  PE_CUDA(cudaGetDevice(&device));
  if (device >= kDevices) throw std::runtime_error("GPU " + std::to_string(device) + " is beyond the first 64");
  Known& k = known[device];
  if (!k.capability.load(std::memory_order_acquire)) {
    int major = 0, minor = 0, shared = 0, processors = 0;
    PE_CUDA(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device));
    PE_CUDA(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device));
    PE_CUDA(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    PE_CUDA(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
    k.shared.store(shared, std::memory_order_relaxed);
    k.processors.store(processors, std::memory_order_relaxed);
    k.capability.store(major * 10 + minor, std::memory_order_release);
  }
  return k;
}

}  // namespace

int compute_capability() { return current().capability.load(std::memory_order_relaxed); }
size_t shared_memory_limit() { return size_t(current().shared.load(std::memory_order_relaxed)); }
int processors() { return current().processors.load(std::memory_order_relaxed); }

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

OnGpu::OnGpu(int device) {
  int current = device;
  if (device < 0) return;
  if (cudaGetDevice(&current) != cudaSuccess) cudaGetLastError();  // no driver: choose() says so
  if (current == device) return;
  PE_CUDA(cudaSetDevice(device));
  before_ = current;
}

OnGpu::~OnGpu() {
  if (before_ >= 0) cudaSetDevice(before_);
}

// Zeroed memory, there before anything that the caller starts next. It is CUDA's own and not torch's: what torch allocates while it
// records or warms up a graph belongs to the graph's pool, and is used for other things between its replays. In a stream of its own, and
// in relaxed mode, since a stream that is being captured neither allows this nor does it.
static void* zeroed(size_t bytes) {
  struct Relaxed {
    cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;
    Relaxed() { PE_CUDA(cudaThreadExchangeStreamCaptureMode(&mode)); }
    ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode); }
  } relaxed;
  void* memory = nullptr;
  cudaStream_t stream;
  PE_CUDA(cudaMalloc(&memory, bytes));
  PE_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  PE_CUDA(cudaMemsetAsync(memory, 0, bytes, stream));
  PE_CUDA(cudaStreamSynchronize(stream));
  PE_CUDA(cudaStreamDestroy(stream));
  return memory;
}

void* gpu_workspace(void* stream, size_t bytes) {
  if (!bytes) return nullptr;
  struct Workspace {
    void* memory = nullptr;
    size_t bytes = 0;
  };
  static std::map<std::tuple<int, void*, unsigned long long>, Workspace> workspaces;  // by GPU, stream and capture, 0 if there is none
  int device = 0;
  unsigned long long capture = 0;
  cudaStreamCaptureStatus status;
  PE_CUDA(cudaGetDevice(&device));
  PE_CUDA(cudaStreamGetCaptureInfo(static_cast<cudaStream_t>(stream), &status, &capture));
  if (status != cudaStreamCaptureStatusActive) capture = 0;
  Workspace& have = workspaces[{device, stream, capture}];
  if (have.bytes < bytes) {
    // What it replaces is never freed: kernels on their way and captured graphs may still use it. Doubling keeps that below what is used.
    const size_t wanted = std::max({bytes, 2 * have.bytes, size_t(1) << 20});
    have = {zeroed(wanted), wanted};
  }
  return have.memory;
}

}  // namespace pe
