// An op's kernels are the rows of a table. A kernel file ends with one static Row; choose() takes the highest rank that accepts.
#pragma once

#include <chrono>
#include <functional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "ops.h"

namespace pe {

enum class Device : int { cpu, cuda };

// What a row needs from the processor it runs on. sm80: a GPU of compute capability 8.x or 9.0; sm90a: of 9.0 alone.
enum class Arch : int { any, avx2, avx512, amx, sm80, sm90a };

// Null if this machine has what `arch` needs, else what is missing. For a GPU it is the calling thread's current one.
const char* missing(Arch arch);

// Makes GPU `device` the calling thread's current one while it lives. −1 changes nothing, and neither does a build without CUDA.
// A thread's first GPU gets a context here; torch has made it before, since it has allocated the tensors.
class OnGpu {
 public:
  explicit OnGpu(int device);
  ~OnGpu();
  OnGpu(const OnGpu&) = delete;

 private:
  int before_ = -1;
};

// Scratch memory of the current GPU for the kernels in `stream`, at least `bytes` long and zeroed at first: the same at each call, unless
// it must grow or the stream is being captured into a graph, which gets its own. Calls must not overlap. Null for no bytes.
void* gpu_workspace(void* stream, size_t bytes);

// Ranks: 0 reference, 1 general, 2 specialised, 3 architecture-specific, 4 on matrix units. No two rows of an op and a device share one, so
// linears with integer activations, which share no problem with the others, are 5 on the CPU's matrix units, and 4 and 5 on CUDA.
template <class Op>
struct Kernel {
  const char* name;
  Device device;
  Arch arch;
  int rank;
  Layout layout;                      // of the weights it reads; canonical where the op has none
  const char* (*refuses)(const Op&);  // returns null, or why this problem is not for it; null: takes all
  void (*run)(const Op&, void* stream);
};

template <class Op>
std::vector<Kernel<Op>>& kernels();

// Adds a kernel to its op's table. Its body is in dispatch.cpp: inlined here it would also be compiled with the instructions of an
// AVX-512 file, and the linker might keep that copy for every machine.
template <class Op>
struct Row {
  explicit Row(Kernel<Op> kernel);
};

// Why `kernel` cannot run `op` here; empty if it can. A packed weight fits the kernels of its layout alone,
// a canonical one may still be packed, so it refuses nobody until run().
template <class Op>
std::string refusal(const Kernel<Op>& kernel, const Op& op) {
  if (const char* why = missing(kernel.arch)) return why;
  const bool on_cpu = kernel.device == Device::cpu;
  if constexpr (requires { op.dtype; }) {
    if (on_cpu != (op.dtype == Dtype::f32)) return on_cpu ? "takes f32 activations" : "takes f16 or bf16 activations";
  }
  if constexpr (requires { op.layout; }) {
    if (op.layout != Layout::canonical && op.layout != kernel.layout) return "weights are packed for another kernel";
  }
  if (const char* why = kernel.refuses ? kernel.refuses(op) : nullptr) return why;
  return {};
}

// The row that would run `op`, or the one called `name`. Throws std::runtime_error that lists every candidate with its reason.
template <class Op>
const Kernel<Op>& choose(const Op& op, const std::string& name = {}) {
  const Kernel<Op>* best = nullptr;
  std::string reasons;
  for (const auto& kernel : kernels<Op>()) {
    if (!name.empty() && name != kernel.name) continue;
    std::string why = refusal(kernel, op);
    if (!why.empty()) {
      reasons += std::string(reasons.empty() ? "" : "; ") + kernel.name + ": " + why;
    } else if (!best || kernel.rank > best->rank) {
      best = &kernel;
    }
  }
  if (best) return *best;
  if (reasons.empty()) throw std::runtime_error("no kernel is called '" + name + "'");
  throw std::runtime_error("no kernel can run this: " + reasons);
}

// choose(), for an op that runs now: its weights must be packed for the kernel already.
template <class Op>
const Kernel<Op>& ready(const Op& op, const std::string& name) {
  const Kernel<Op>& kernel = choose(op, name);
  if constexpr (requires { op.layout; }) {
    if (op.layout != kernel.layout) throw std::runtime_error(std::string(kernel.name) + ": weights must be packed for it first");
  }
  return kernel;
}

// Starts a kernel; one for CUDA whose op brings no workspace works in the stream's.
template <class Op>
void start(const Kernel<Op>& kernel, const Op& op, void* stream) {
  if constexpr (requires { op.workspace; }) {
    if (kernel.device == Device::cuda && !op.workspace) {
      Op with_workspace = op;
      with_workspace.workspace = gpu_workspace(stream, workspace_bytes(op));
      return kernel.run(with_workspace, stream);
    }
  }
  kernel.run(op, stream);
}

template <class Op>
void run(const Op& op, void* stream = nullptr, const std::string& name = {}) {
  start(ready(op, name), op, stream);
}

// Ops with their kernels chosen, to be run again and again over the same buffers: one call for a whole decode step.
class Program {
 public:
  template <class Op>
  void add(const Op& op, const std::string& name = {}) {
    const Kernel<Op>& kernel = ready(op, name);
    steps_.push_back({kernel.name, [op, &kernel](void* stream) { start(kernel, op, stream); }});
  }

  void run(void* stream) const {
    for (const Step& step : steps_) step.run(stream);
  }

  // Runs, and says how many seconds each step took: on the CPU, where a step is done when its call returns.
  std::vector<std::pair<std::string, double>> time() const {
    std::vector<std::pair<std::string, double>> all;
    for (const Step& step : steps_) {
      const auto start = std::chrono::steady_clock::now();
      step.run(nullptr);
      all.emplace_back(step.kernel, std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
    return all;
  }

 private:
  struct Step {
    const char* kernel;
    std::function<void(void*)> run;
  };
  std::vector<Step> steps_;
};

}  // namespace pe
