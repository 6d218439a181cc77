// Stands in for the CUDA runtime: the host objects that nvcc has built are linked with this, so their own launchers start the emulated
// kernels. Device 0 is of compute capability 8.0, device 1 of 9.0, device 2 of 8.9, which runs the code for 8.0 in less shared memory. Only what
// our launchers use is here, and in cudart_host.cpp what a program beside them does; anything else fails to link.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cxxabi.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <string>

#include "control.h"
#include "machine.h"

namespace emu {
namespace {

struct Function {
  std::string name;
  int max_dynamic = 48 * 1024;
};
std::map<const void*, Function>& functions() {
  static std::map<const void*, Function> all;
  return all;
}
struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  void* stream;
};
thread_local Configuration pushed;
thread_local cudaError_t last_error = cudaSuccess;
std::map<cudaStream_t, unsigned long long> captures;  // streams that are being captured

cudaError_t fail(cudaError_t error) { return last_error = error; }

std::string readable(const char* name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  const std::string result = status ? name : text;
  free(text);
  return result;
}

constexpr int kCapability[] = {80, 90, 89};
constexpr int kShared[] = {163 * 1024, 227 * 1024, 99 * 1024};

int current_device() { return int(std::find(std::begin(kCapability), std::end(kCapability), options().arch) - kCapability); }
int shared_limit() { return kShared[current_device()]; }

// Null if the launch is one that a GPU would take.
const char* refuse(const Launch& l, const Function& f) {
  u32 static_bytes = 0;
  for (const Span& s : l.kernel->shared) static_bytes += s.bytes;
  if (!l.grid.count() || l.grid.y > 65535 || l.grid.z > 65535 || l.grid.x > 0x7fffffff) return "the grid is empty or too large";
  if (!l.block.count() || l.block.count() > l.kernel->max_threads || l.block.z > 64)
    return "the block is empty or larger than the kernel was compiled for";
  if (int(l.dynamic_bytes) > f.max_dynamic) return "more dynamic shared memory than was asked for with cudaFuncSetAttribute";
  if (int(l.dynamic_bytes + static_bytes) > shared_limit()) return "more shared memory than a block can have";
  if (l.cluster.count() > 1 && options().arch < 90) return "clusters need compute capability 9.0";
  if (l.cluster.count() > 8 || l.grid.x % l.cluster.x || l.grid.y % l.cluster.y || l.grid.z % l.cluster.z)
    return "the grid is no multiple of the cluster";
  return nullptr;
}

cudaError_t launch(const void* host, dim3 grid, dim3 block, void** args, size_t shared_bytes, void* stream, dim3 cluster, bool overlaps) {
  auto f = functions().find(host);
  const Kernel* kernel = f == functions().end() ? nullptr : find_kernel(f->second.name, options().arch / 10 * 10);
  if (!kernel) return fail(cudaErrorInvalidDeviceFunction);
  Launch& l = new_launch();
  l.kernel = kernel, l.options = options();
  l.grid = {grid.x, grid.y, grid.z}, l.block = {block.x, block.y, block.z};
  l.cluster = kernel->cluster.count() > 1 ? kernel->cluster : Dim3{cluster.x, cluster.y, cluster.z};
  l.dynamic_bytes = u32(shared_bytes);
  if (const char* why = refuse(l, f->second)) {
    report(nullptr, "launch", 0, "%s: %s", readable(kernel->name).c_str(), why);
    forget_launch();
    return fail(cudaErrorInvalidConfiguration);
  }
  for (size_t i = 0; i < kernel->params.size(); ++i) memcpy(l.params.data() + kernel->params[i].offset, args[i], kernel->params[i].bytes);
  l.first_serial = new_serials(u32(l.grid.count() / l.cluster.count()));
  order_launch(l, stream, overlaps);
  run(l);
  if (overlaps && !l.waited && !l.stopped)
    report(nullptr, "grid-dependency", 0, "%s may overlap the kernel before it and never calls griddepcontrol.wait",
           readable(kernel->name).c_str());
  return l.stopped ? fail(cudaErrorLaunchFailure) : cudaSuccess;
}

}  // namespace
}  // namespace emu

using namespace emu;

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*, void*, int*) {
  functions()[host].name = name;
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, void* stream) {
  pushed = {grid, block, shared_bytes, stream};
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  *grid = pushed.grid, *block = pushed.block, *shared_bytes = pushed.shared_bytes, *static_cast<void**>(stream) = pushed.stream;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes, cudaStream_t stream) {
  return launch(kernel, grid, block, args, shared_bytes, stream, {1, 1, 1}, false);
}
cudaError_t cudaLaunchKernel(const void* kernel, dim3 grid, dim3 block, void** args, size_t shared_bytes, cudaStream_t stream) {
  return launch(kernel, grid, block, args, shared_bytes, stream, {1, 1, 1}, false);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel, void** args) {
  dim3 cluster{1, 1, 1};
  bool overlaps = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& a = config->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) {
      cluster = {a.val.clusterDim.x, a.val.clusterDim.y, a.val.clusterDim.z};
    } else if (a.id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      overlaps = a.val.programmaticStreamSerializationAllowed;
    } else {
      return fail(cudaErrorNotSupported);
    }
  }
  return launch(kernel, config->gridDim, config->blockDim, args, config->dynamicSmemBytes, config->stream, cluster, overlaps);
}
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  auto f = functions().find(kernel);
  if (f == functions().end()) return fail(cudaErrorInvalidDeviceFunction);
  if (attribute == cudaFuncAttributePreferredSharedMemoryCarveout) return cudaSuccess;
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize || value > shared_limit()) return fail(cudaErrorInvalidValue);
  f->second.max_dynamic = value;
  return cudaSuccess;
}

cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
cudaError_t cudaPeekAtLastError() { return last_error; }
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "an error of the emulated CUDA runtime";
  }
}

cudaError_t cudaGetDeviceCount(int* count) {
  *count = int(std::size(kCapability));
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int* device) {
  *device = current_device();
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= int(std::size(kCapability))) return fail(cudaErrorInvalidDevice);
  options().arch = kCapability[device];
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor:
      *value = kCapability[device] / 10;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor:
      *value = kCapability[device] % 10;
      return cudaSuccess;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      return cudaSuccess;  // few: grids that are sized by it stay small
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = kShared[device];
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor:
      *value = kShared[device] + 1024;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = 40 << 20;
      return cudaSuccess;
    default:
      return fail(cudaErrorInvalidValue);
  }
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** memory, size_t bytes) {
  *memory = reinterpret_cast<void*>(allocate(bytes, "cudaMalloc", 256, true));
  return *memory ? cudaSuccess : fail(cudaErrorMemoryAllocation);
}
int emu_upload(u64 address, const void* from, u64 bytes);  // control.cpp
cudaError_t cudaMemsetAsync(void* memory, int value, size_t bytes, cudaStream_t stream) {
  if (captures.count(stream)) return fail(cudaErrorStreamCaptureUnsupported);  // it would happen at each replay, and not now
  const std::string values(bytes, char(value));
  return emu_upload(reinterpret_cast<u64>(memory), values.data(), bytes) ? cudaSuccess : fail(cudaErrorInvalidValue);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id, cudaGraph_t*,
                                     const cudaGraphNode_t**, const cudaGraphEdgeData**, size_t*) {
  const auto capture = captures.find(stream);
  *status = capture == captures.end() ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  if (capture != captures.end()) *id = capture->second;
  return cudaSuccess;
}
// From now on the stream says that it is being captured, as number `id`; 0: that it is not. Kernels run at once all the same.
__attribute__((visibility("default"))) void emu_capture(u64 stream, u64 id) {
  captures.erase(reinterpret_cast<cudaStream_t>(stream));
  if (id) captures[reinterpret_cast<cudaStream_t>(stream)] = id;
}

static CUresult encode_tiled(CUtensorMap* out, CUtensorMapDataType type, cuuint32_t rank, void* address, const cuuint64_t* dims,
                             const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                             CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion,
                             CUtensorMapFloatOOBfill fill) {
  static constexpr u32 kSize[] = {1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4};  // by CUtensorMapDataType
  TensorMap map{};
  if (size_t(type) >= std::size(kSize) || !rank || rank > 5 || interleave != CU_TENSOR_MAP_INTERLEAVE_NONE ||
      fill != CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE)
    return CUDA_ERROR_INVALID_VALUE;
  if (swizzle > CU_TENSOR_MAP_SWIZZLE_128B) return CUDA_ERROR_INVALID_VALUE;
  map.magic = kTensorMapMagic, map.element = kSize[type], map.rank = rank, map.base = reinterpret_cast<u64>(address);
  map.swizzle = swizzle ? 16u << swizzle : 0;
  for (u32 i = 0; i < rank; ++i) {
    map.dims[i] = dims[i], map.box[i] = box[i], map.strides[i] = i ? strides[i - 1] : map.element;
    if (!dims[i] || !box[i] || box[i] > 256 || element_strides[i] != 1 || (i && strides[i - 1] % 16)) return CUDA_ERROR_INVALID_VALUE;
  }
  const u32 inner = map.box[0] * map.element;
  if (map.base % 16 || inner % 16 || (map.swizzle && inner > map.swizzle)) return CUDA_ERROR_INVALID_VALUE;
  memset(out, 0, sizeof *out);
  memcpy(out, &map, sizeof map);
  return CUDA_SUCCESS;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned, unsigned long long,
                                             cudaDriverEntryPointQueryResult* status) {
  const bool known = !strcmp(symbol, "cuTensorMapEncodeTiled");
  *function = known ? reinterpret_cast<void*>(&encode_tiled) : nullptr;
  if (status) *status = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return known ? cudaSuccess : fail(cudaErrorInvalidValue);
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  *stream = static_cast<cudaStream_t>(create_stream(flags != cudaStreamNonBlocking));
  return cudaSuccess;
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  host_waits(stream);
  return cudaSuccess;
}
cudaError_t cudaDeviceSynchronize() {
  host_waits_for_all();
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = static_cast<cudaEvent_t>(create_event());
  return cudaSuccess;
}
cudaError_t cudaEventDestroy(cudaEvent_t) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  record_event(event, stream);
  return cudaSuccess;
}
cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  stream_waits(stream, event);
  return cudaSuccess;
}

}  // extern "C"
