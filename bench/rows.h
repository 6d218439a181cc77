// Which rows of the dispatch table the options ask for.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "dispatch.h"
#include "options.h"

namespace bench {

// Calls visit<Op>(name) for every op, or the one that is named.
template <class F>
void each_op(const std::string& named, F&& visit) {
  bool found = false;
  auto one = [&]<class Op>(const char* name) {
    if (!named.empty() && named != name) return;
    found = true;
    visit.template operator()<Op>(name);
  };
  one.template operator()<pe::QLinear>("qlinear");
  one.template operator()<pe::Embedding>("embedding");
  one.template operator()<pe::ScatterAdd>("scatter_add");
  one.template operator()<pe::RmsNorm>("rmsnorm");
  one.template operator()<pe::SiluMul>("silu_mul");
  one.template operator()<pe::Transform>("transform");
  one.template operator()<pe::RopeKV>("rope_kv");
  one.template operator()<pe::Attention>("attention");
  one.template operator()<pe::Sample>("sample");
  one.template operator()<pe::RoundColumns>("round_columns");
  if (!found)
    throw std::runtime_error("--op is '" + named +
                             "', known are qlinear embedding scatter_add rmsnorm silu_mul transform rope_kv attention sample round_columns");
}

// A kernel belongs to one op: its name picks it.
template <class Op>
bool wanted(const Options& o) {
  const auto& rows = pe::kernels<Op>();
  return o.kernel.empty() || std::any_of(rows.begin(), rows.end(), [&](const auto& row) { return o.kernel == row.name; });
}

// Throws if the kernel that is named belongs to the other device.
template <class Op>
void check_device(const Options& o) {
  const pe::Device device = o.device == "cuda" ? pe::Device::cuda : pe::Device::cpu;
  for (const auto& kernel : pe::kernels<Op>())
    if (o.kernel == kernel.name && kernel.device != device)
      throw std::runtime_error(o.kernel +
                               (device == pe::Device::cpu ? " runs on a GPU: --device cuda times it" : " runs on the CPU: --device cpu times it"));
}

// The rows to time: the one that is named, else all of the device that can run the problem but the oracle.
template <class Op>
std::vector<const pe::Kernel<Op>*> chosen(const Op& op, const std::string& named, pe::Device device) {
  if (!named.empty()) return {&pe::choose(op, named)};
  std::vector<const pe::Kernel<Op>*> all;
  for (const auto& kernel : pe::kernels<Op>())
    if (kernel.device == device && kernel.rank > 0 && pe::refusal(kernel, op).empty()) all.push_back(&kernel);
  if (all.empty()) all.push_back(&pe::choose(op));
  return all;
}

// --device cuda: in a build without CUDA it throws.
int run_on_gpu(const Options& o);

}  // namespace bench
