// qbench: checks and times the kernels of the dispatch table without Python. `qbench --help` explains options and columns.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>

#include "cpu/threads.h"
#include "dense.h"
#include "gpu_problem.h"
#include "options.h"
#include "problem.h"
#include "report.h"
#include "roofline.h"
#include "rows.h"

namespace bench {
namespace {

constexpr int kLeastRuns = 20, kMostRuns = 1000;
constexpr double kSecondsPerRow = 0.3;  // many runs of a short op: one is shorter than a scheduler's whim

std::string cpu_name() {
  std::ifstream file("/proc/cpuinfo");
  for (std::string line; std::getline(file, line);)
    if (line.rfind("model name", 0) == 0) return line.substr(line.find(':') + 2);
  return "unknown CPU";
}

template <class F>
double timed(int copies, F&& run) {
  const double first = median_us(1, [&](int) { run(0); });
  const int runs = std::clamp(int(kSecondsPerRow * 1e6 / first), kLeastRuns, kMostRuns);
  return median_us(runs, [&](int i) { run(i % copies); });
}

// The time of a dense product with weights of type W in the same shape.
template <class W>
std::optional<double> dense_us(const Spec& s, size_t cold) {
  constexpr size_t kMostBytes = size_t(4) << 30;
  const size_t each = size_t(s.n) * size_t(s.k) * sizeof(W), copies = std::max<size_t>(1, (cold + each - 1) / each);
  if (each > kMostBytes) return {};
  const Buffer weight(each * copies), x(size_t(s.m * s.k) * 4), y(size_t(s.m * s.n) * 4);
  std::memset(weight.as<char>(), 0x3c, weight.bytes());  // 0.0115 in either type: neither zero nor denormal
  std::memset(x.as<char>(), 0x3c, x.bytes());
  const Dense op{s.m, s.n, s.k, x.as<float>(), y.as<float>()};
  return timed(int(copies), [&](int i) { dense(op, weight.as<W>() + size_t(i) * size_t(s.n) * size_t(s.k)); });
}

// Where all operands are warm, memory sets no bound.
template <class Op>
std::optional<double> least_us(const Problem<Op>& problem, const Roofline& roofline, size_t cold) {
  if (problem.cold_bytes() == 0 || cold == 0) return {};
  double rate = roofline.float_gop_s();
  if constexpr (std::is_same_v<Op, pe::QLinear>)
    if (problem.op().act_bits < 16) rate = roofline.int_gop_s();
  return std::max(problem.cold_bytes() / roofline.read_gb_s, problem.operations() / rate) / 1e3;
}

template <class Op>
Line measure(const std::string& name, const pe::Kernel<Op>& kernel, const Problem<Op>& problem, const Spec& spec, const Options& o,
             const Roofline& roofline) {
  Line line{name, kernel.name, spec};
  if (o.check) {
    line.error = problem.error(kernel);
    if (const double allowed = bound(kernel, problem.op()); !(*line.error <= allowed)) {
      char text[160];
      std::snprintf(text, sizeof text, "%s is wrong on %s with m = %lld: error %.3g, allowed %.3g", kernel.name, spec.label.c_str(),
                    (long long)spec.m, *line.error, allowed);
      throw std::runtime_error(text);
    }
  }
  if (o.check_only) return line;
  const auto prepared = problem.prepare(kernel, o.cold_bytes);
  line.copies = int(prepared.copies.size());
  const double us = timed(line.copies, [&](int i) { kernel.run(prepared.copies[size_t(i)], nullptr); });
  line.us = us, line.gb_s = problem.bytes() / us / 1e3, line.gop_s = problem.operations() / us / 1e3;
  if (const auto least = least_us(problem, roofline, o.cold_bytes)) line.of_peak = *least / us;
  return line;
}

std::string json(const Roofline& r, const Options& o) {
  const std::string machine = "{\"cpu\": " + quoted(cpu_name()) + ", \"threads\": " + std::to_string(pe::threads());
  if (o.check_only) return machine + "}";
  return machine + ", \"cold_mib\": " + std::to_string(o.cold_bytes >> 20) + ", \"read_gb_s\": " + real(r.read_gb_s) +
         ", \"fp32_gop_s\": " + real(r.fp32_gop_s) + ", \"vnni_gop_s\": " + real(r.vnni_gop_s) + ", \"bf16_gop_s\": " + real(r.bf16_gop_s) +
         ", \"amx_int8_gop_s\": " + real(r.amx_int8_gop_s) + ", \"amx_bf16_gop_s\": " + real(r.amx_bf16_gop_s) + "}";
}

// The others are only listed.
template <class Op>
constexpr bool benchmarked = !std::is_same_v<Op, pe::Embedding> && !std::is_same_v<Op, pe::ScatterAdd> && !std::is_same_v<Op, pe::Sample> &&
                             !std::is_same_v<Op, pe::RoundColumns>;

void list(const Options& o) {
  std::string separator = "{\"kernels\": [";
  each_op(o.op, [&]<class Op>(const char* name) {
    for (const auto& kernel : pe::kernels<Op>()) {
      const char *device = kernel.device == pe::Device::cpu ? "cpu" : "cuda", *why = pe::missing(kernel.arch);
      if (!o.device.empty() && o.device != device) continue;
      const int lanes = int(kernel.layout);
      const std::string layout = lanes == 0 ? "canonical" : lanes == 1 ? "mma" : "tile" + std::to_string(lanes);
      if (o.json) {
        std::printf("%s\n{\"op\": \"%s\", \"name\": %s, \"device\": \"%s\", \"rank\": %d, \"layout\": \"%s\", \"missing\": %s}",
                    separator.c_str(), name, quoted(kernel.name).c_str(), device, kernel.rank, layout.c_str(),
                    why ? quoted(why).c_str() : "null");
        separator = ",";
      } else {
        std::printf("%-9s %-24s %-5s rank %d  %-10s %s\n", name, kernel.name, device, kernel.rank, layout.c_str(), why ? why : "");
      }
    }
  });
  if (o.json) std::printf("%s]}\n", separator.size() > 1 ? separator.c_str() : "");
}

// Refuses what cannot be run before seconds are spent on the machine's peaks.
void check_names_and_shapes(const Options& o) {
  if (!o.shape.empty() && o.op.empty()) throw std::runtime_error("--shape needs --op, whose shape it is");
  bool known = false;
  each_op(o.op, [&]<class Op>(const char* name) {
    if (!wanted<Op>(o)) return;
    known = true;
    check_device<Op>(o);
    if (o.device == "cuda" ? gpu::measured<Op> : benchmarked<Op>)
      (void)specs(name, o);
    else if (!o.op.empty())
      throw std::runtime_error(std::string(name) + " is only listed, not timed" + (gpu::measured<Op> ? " on the CPU" : ""));
  });
  if (!known) throw std::runtime_error("no kernel" + (o.op.empty() ? "" : " of " + o.op) + " is called '" + o.kernel + "'");
}

template <class Op>
void measure_op(const char* name, const Options& o, const Roofline& roofline, std::vector<Line>& lines) {
  if (!wanted<Op>(o)) return;
  for (const Spec& spec : specs(name, o)) {
    const Problem<Op> problem(spec);
    std::optional<double> fp32, bf;
    if constexpr (std::is_same_v<Op, pe::QLinear>)
      if (!o.check_only) fp32 = dense_us<float>(spec, o.cold_bytes), bf = dense_us<bf16>(spec, o.cold_bytes);
    for (const auto* kernel : chosen(problem.op(), o.kernel, pe::Device::cpu)) {
      lines.push_back(measure(name, *kernel, problem, spec, o, roofline));
      lines.back().fp32_us = fp32, lines.back().bf16_us = bf;
      if (!o.json) print(lines.back());
    }
  }
}

std::vector<Line> measure_all(const Options& o, const Roofline& roofline) {
  std::vector<Line> lines;
  each_op(o.op, [&]<class Op>(const char* name) {
    if constexpr (benchmarked<Op>) measure_op<Op>(name, o, roofline, lines);
  });
  return lines;
}

int run(const Options& o) {
  if (o.help) return std::fputs(kHelp, stdout), 0;
  if (o.threads) pe::set_threads(o.threads);
  if (o.list) return list(o), 0;
  check_names_and_shapes(o);
  if (o.device == "cuda") return run_on_gpu(o);
  Roofline roofline;
  if (!o.check_only) {
    const Buffer memory(size_t(512) << 20);
    std::memset(memory.as<char>(), 1, memory.bytes());
    roofline = measure_roofline(memory.as<char>(), memory.bytes());
  }
  if (!o.json && !o.check_only)
    std::printf(
        "%s, %d threads: reads %.1f GB/s; fp32 %.0f, bf16 %.0f, vnni %.0f, AMX bf16 %.0f, AMX int8 %.0f GOP/s. Weights rotate through %zu "
        "MiB.\n\n",
        cpu_name().c_str(), pe::threads(), roofline.read_gb_s, roofline.fp32_gop_s, roofline.bf16_gop_s, roofline.vnni_gop_s,
        roofline.amx_bf16_gop_s, roofline.amx_int8_gop_s, o.cold_bytes >> 20);
  if (!o.json) print_header(false);
  const auto lines = measure_all(o, roofline);
  if (!o.json) return 0;
  std::printf("{\"machine\": %s, \"rows\": [", json(roofline, o).c_str());
  for (size_t i = 0; i < lines.size(); ++i) std::printf("%s\n%s", i ? "," : "", json(lines[i]).c_str());
  std::puts("]}");
  return 0;
}

}  // namespace

#if !defined(PE_CUDA_BUILT)
int run_on_gpu(const Options&) { throw std::runtime_error(pe::missing(pe::Arch::sm80)); }
#endif

}  // namespace bench

int main(int argc, char** argv) {
  try {
    return bench::run(bench::parse(argc, argv));
  } catch (const bench::WrongUsage& e) {
    std::fprintf(stderr, "qbench: %s\n", e.what());
    return 2;
  } catch (const std::bad_alloc&) {
    std::fprintf(stderr, "qbench: not enough memory for this problem\n");
  } catch (const std::exception& e) {
    std::fprintf(stderr, "qbench: %s\n", e.what());
  }
  return 1;
}
