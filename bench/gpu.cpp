#include "gpu.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <fstream>
#include <stdexcept>
#include <vector>

#include "cublas.h"
#include "cuda/launch.cuh"
#include "operands.h"

namespace bench::gpu {
namespace {

constexpr int kWarmUps = 3, kRuns = 21;
constexpr double kMicrosecondsPerRun = 4000;
constexpr int kMostCalls = 400;

struct Stream {
  cudaStream_t handle = nullptr;
  Stream() { PE_CUDA(cudaStreamCreateWithFlags(&handle, cudaStreamNonBlocking)); }
  ~Stream() { cudaStreamDestroy(handle); }
};

struct Event {
  cudaEvent_t handle = nullptr;
  Event() { PE_CUDA(cudaEventCreateWithFlags(&handle, cudaEventDefault)); }
  ~Event() { cudaEventDestroy(handle); }
};

// Calls recorded to be run again and again.
struct Graph {
  cudaGraphExec_t exec = nullptr;
  Graph(cudaStream_t stream, const std::function<void()>& calls) {
    PE_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    calls();
    cudaGraph_t graph = nullptr;
    PE_CUDA(cudaStreamEndCapture(stream, &graph));
    const cudaError_t error = cudaGraphInstantiate(&exec, graph, 0);
    cudaGraphDestroy(graph);
    pe::check_cuda(error, "cudaGraphInstantiate");
  }
  ~Graph() { cudaGraphExecDestroy(exec); }
};

double elapsed_us(cudaStream_t stream, const std::function<void()>& work) {
  const Event begin, end;
  PE_CUDA(cudaEventRecord(begin.handle, stream));
  work();
  PE_CUDA(cudaEventRecord(end.handle, stream));
  PE_CUDA(cudaStreamSynchronize(stream));
  float ms = 0;
  PE_CUDA(cudaEventElapsedTime(&ms, begin.handle, end.handle));
  return ms * 1e3;
}

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  PE_CUDA(cudaGetDevice(&device));
  PE_CUDA(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

std::string version(int v) { return std::to_string(v / 1000) + "." + std::to_string(v / 10 % 100); }  // 13010 is 13.1

// The kernel module's, which the runtime does not tell: "NVRM version: NVIDIA UNIX … Kernel Module  580.65.06  Release …".
std::string driver_version() {
  std::ifstream file("/proc/driver/nvidia/version");
  for (std::string word; file >> word;)
    if (std::count(word.begin(), word.end(), '.') >= 1 && word.find_first_not_of("0123456789.") == std::string::npos) return word;
  int cuda = 0;
  PE_CUDA(cudaDriverGetVersion(&cuda));
  return "for CUDA " + version(cuda);
}

// Random values: constant ones cost a tensor core less power, and a higher clock would be measured. `mask` keeps f16 finite.
Memory random_memory(size_t bytes, uint64_t mask) {
  Memory memory(bytes);
  std::vector<uint64_t> block(std::min(bytes, size_t(8) << 20) / 8);
  Random random(2);
  for (auto& word : block) word = random() & mask;
  memory.upload(block.data(), block.size() * 8);
  memory.fill_from(block.size() * 8);
  return memory;
}
constexpr uint64_t kHalves = 0xbbffbbffbbffbbffu, kBytes = ~uint64_t(0);  // below 1, and any

}  // namespace

Memory::Memory(size_t bytes) : bytes_(bytes) {
  if (cudaMalloc(reinterpret_cast<void**>(&data_), std::max<size_t>(bytes, 256)) != cudaSuccess) {
    cudaGetLastError();
    throw std::runtime_error("the GPU has no " + std::to_string(bytes >> 20) + " MiB left for this problem");
  }
  PE_CUDA(cudaMemset(data_, 0, std::max<size_t>(bytes, 256)));
}
Memory::~Memory() { cudaFree(data_); }
Memory::Memory(Memory&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(std::exchange(other.bytes_, 0)) {}
void Memory::upload(const void* from, size_t bytes, size_t at) { PE_CUDA(cudaMemcpy(data_ + at, from, bytes, cudaMemcpyHostToDevice)); }
void Memory::download(void* to, size_t bytes) const { PE_CUDA(cudaMemcpy(to, data_, bytes, cudaMemcpyDeviceToHost)); }
void Memory::fill_from(size_t bytes) {
  for (size_t done = bytes; done < bytes_; done += std::min(done, bytes_ - done))
    PE_CUDA(cudaMemcpy(data_ + done, data_, std::min(done, bytes_ - done), cudaMemcpyDeviceToDevice));
}

void finish() { PE_CUDA(cudaDeviceSynchronize()); }

Machine machine() {
  Machine m;
  int device = 0, runtime = 0;
  cudaDeviceProp properties;
  PE_CUDA(cudaGetDevice(&device));
  PE_CUDA(cudaGetDeviceProperties(&properties, device));
  PE_CUDA(cudaRuntimeGetVersion(&runtime));
  m.name = properties.name, m.memory_bytes = properties.totalGlobalMem;
  m.driver = driver_version(), m.cuda = version(runtime), m.capability = pe::compute_capability();
  m.processors = attribute(cudaDevAttrMultiProcessorCount), m.l2_bytes = size_t(attribute(cudaDevAttrL2CacheSize));
  return m;
}

double timed(int copies, const std::function<void(int, void*)>& run) {
  const Stream stream;
  finish();
  run(0, stream.handle);  // what is set up at a first call is no part of the time
  PE_CUDA(cudaStreamSynchronize(stream.handle));
  const double first = elapsed_us(stream.handle, [&] { run(0, stream.handle); });
  const int wanted = std::clamp(int(kMicrosecondsPerRun / std::max(first, 1.0)), 1, kMostCalls), calls = (wanted + copies - 1) / copies * copies;
  const Graph graph(stream.handle, [&] {
    for (int i = 0; i < calls; ++i) run(i % copies, stream.handle);
  });
  std::vector<double> us;
  for (int i = -kWarmUps; i < kRuns; ++i) {
    const double time = elapsed_us(stream.handle, [&] { PE_CUDA(cudaGraphLaunch(graph.exec, stream.handle)); });
    if (i >= 0) us.push_back(time / calls);
  }
  std::nth_element(us.begin(), us.begin() + kRuns / 2, us.end());
  return us[kRuns / 2];
}

std::optional<double> product_us(const Cublas& cublas, bool int8, int64_t m, int64_t n, int64_t k, size_t cold) {
  constexpr size_t kMostBytes = size_t(8) << 30;
  const size_t value = int8 ? 1 : 2, each = size_t(n) * size_t(k) * value, copies = std::max<size_t>(1, (cold + each - 1) / each);
  if (each * copies > kMostBytes) return {};
  std::unique_ptr<Cublas::Product> product;
  try {
    product = std::make_unique<Cublas::Product>(cublas, int8, m, n, k);
  } catch (const std::runtime_error&) {
    return {};
  }
  const uint64_t mask = int8 ? kBytes : kHalves;
  const Memory w = random_memory(each * copies, mask), x = random_memory(size_t(m * k) * value, mask), y(size_t(m * n) * (int8 ? 4 : 2));
  return timed(int(copies), [&](int i, void* stream) { product->run(x.data(), w.data() + size_t(i) * each, y.data(), stream); });
}

Ceilings measure_ceilings(const Cublas* cublas) {
  Ceilings c;
  const size_t bytes = std::min(size_t(1) << 30, machine().memory_bytes / 8);
  {
    const Memory from = random_memory(bytes, kBytes), to(bytes);
    c.copy_gb_s = 2.0 * double(bytes) / 1e3 / timed(1, [&](int, void* stream) {
                    PE_CUDA(cudaMemcpyAsync(to.data(), from.data(), bytes, cudaMemcpyDeviceToDevice, static_cast<cudaStream_t>(stream)));
                  });
  }
  constexpr int64_t kSize = 8192;
  auto rate = [&](bool int8) -> std::optional<double> {
    const auto us = cublas ? product_us(*cublas, int8, kSize, kSize, kSize, 0) : std::nullopt;
    return us ? std::optional(2.0 * kSize * kSize * kSize / *us / 1e3) : std::nullopt;
  };
  c.fp16_gop_s = rate(false), c.int8_gop_s = rate(true);
  return c;
}

}  // namespace bench::gpu
