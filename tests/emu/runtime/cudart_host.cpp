// More of the stand-in for the CUDA runtime: what a program of its own needs beside our launchers, here qbench. Memory is never given back;
// a captured graph has run when it was captured, and does nothing when it is launched; everything takes a millisecond.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "control.h"

extern "C" int emu_upload(emu::u64 address, const void* from, emu::u64 bytes);
extern "C" int emu_download(void* to, emu::u64 address, emu::u64 bytes);

namespace {

emu::u64 address(const void* p) { return reinterpret_cast<emu::u64>(p); }
cudaError_t result(int done) { return done ? cudaSuccess : cudaErrorInvalidValue; }
template <class T>
cudaError_t make(T* handle) {
  static int anything;
  *handle = reinterpret_cast<T>(&anything);
  return cudaSuccess;
}

}  // namespace

extern "C" {

cudaError_t cudaFree(void*) { return cudaSuccess; }
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  const std::vector<unsigned char> values(bytes, static_cast<unsigned char>(value));
  return result(emu_upload(address(to), values.data(), bytes));
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  emu::host_waits(nullptr);
  if (kind == cudaMemcpyHostToDevice) return result(emu_upload(address(to), from, bytes));
  if (kind == cudaMemcpyDeviceToHost) return result(emu_download(to, address(from), bytes));
  std::vector<unsigned char> between(bytes);
  return result(emu_download(between.data(), address(from), bytes) && emu_upload(address(to), between.data(), bytes));
}
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) { return cudaMemcpy(to, from, bytes, kind); }

cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "emulated GPU");
  p->totalGlobalMem = size_t(16) << 20;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 1, cudaSuccess; }
cudaError_t cudaStreamBeginCapture(cudaStream_t, cudaStreamCaptureMode) { return cudaSuccess; }
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t* graph) { return make(graph); }
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t, unsigned long long) { return make(exec); }
cudaError_t cudaGraphLaunch(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }

}  // extern "C"
