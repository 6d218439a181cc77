// qbench --device cuda: the CUDA rows of the table, against the reference on the CPU and against what the GPU can do at best.
#include <cstdio>

#include "commit.h"
#include "cublas.h"
#include "gpu_problem.h"
#include "report.h"
#include "rows.h"

namespace bench {
namespace {

struct Gpu {
  gpu::Machine machine;
  std::unique_ptr<Cublas> cublas;
  gpu::Ceilings ceilings;  // none with --check-only
  size_t cold;
};

// The time that memory or the tensor cores need at least. Where all operands are warm, memory sets no bound.
template <class Op>
std::optional<double> least_us(const Problem<Op>& problem, const Gpu& g) {
  if (problem.cold_bytes() == 0 || g.cold == 0) return {};
  const double memory = problem.bytes() / *g.ceilings.copy_gb_s;
  auto rate = g.ceilings.fp16_gop_s;
  if constexpr (std::is_same_v<Op, pe::QLinear>)
    if (problem.op().act_bits < 16) rate = g.ceilings.int8_gop_s;
  return std::max(memory, rate ? problem.operations() / *rate : 0.0) / 1e3;
}

void check(const char* what, double error, double allowed, const Spec& spec) {
  if (error <= allowed) return;
  char text[160];
  std::snprintf(text, sizeof text, "%s is wrong on %s with m = %lld: error %.3g, allowed %.3g", what, spec.label.c_str(), (long long)spec.m,
                error, allowed);
  throw std::runtime_error(text);
}

template <class Op>
Line measure(const char* name, const pe::Kernel<Op>& kernel, const Problem<Op>& problem, const Spec& spec, const Options& o, const Gpu& g) {
  Line line{name, kernel.name, spec};
  const auto placed = gpu::place(problem, spec, g.cold);
  if (o.check) {
    line.error = gpu::error(kernel, problem, spec, placed);
    check(kernel.name, *line.error, gpu::bound<Op>(spec.dtype), spec);
  }
  line.copies = int(placed.copies.size());
  if (o.check_only) return line;
  const double us = gpu::timed(line.copies, [&](int i, void* stream) { kernel.run(placed.copies[size_t(i)], stream); });
  line.us = us, line.gb_s = problem.bytes() / us / 1e3, line.gop_s = problem.operations() / us / 1e3;
  if (const auto least = least_us(problem, g)) line.of_peak = *least / us;
  if constexpr (std::is_same_v<Op, pe::Transform>) {
    const gpu::Apart apart = gpu::apart(problem, spec, placed, o.check);
    if (apart.error) check("its steps apart", *apart.error, 2 * gpu::bound<Op>(spec.dtype), spec);  // what is between them is rounded too
    line.apart_us = apart.us;
  }
  return line;
}

template <class Op>
bool has_rows() {
  const auto& rows = pe::kernels<Op>();
  return std::any_of(rows.begin(), rows.end(), [](const auto& row) { return row.device == pe::Device::cuda; });
}

template <class Op>
void measure_op(const char* name, const Options& o, const Gpu& g, std::vector<Line>& lines) {
  if (!wanted<Op>(o) || (o.op.empty() && o.kernel.empty() && !has_rows<Op>())) return;
  for (const Spec& spec : specs(name, o)) {
    const Problem<Op> problem(spec);
    std::optional<double> fp16, int8;
    if constexpr (std::is_same_v<Op, pe::QLinear>) {
      if (g.cublas && !o.check_only) fp16 = gpu::product_us(*g.cublas, false, spec.m, spec.n, spec.k, g.cold);
      if (fp16 && spec.act_bits < 16) int8 = gpu::product_us(*g.cublas, true, spec.m, spec.n, spec.k, g.cold);
    }
    for (const auto* kernel : chosen(gpu::asked(problem, spec), o.kernel, pe::Device::cuda)) {
      lines.push_back(measure(name, *kernel, problem, spec, o, g));
      lines.back().fp16_us = fp16, lines.back().int8_us = int8;
      if (!o.json) print(lines.back());
    }
  }
}

std::string json(const Gpu& g) {
  const gpu::Machine& m = g.machine;
  return "{\"gpu\": " + quoted(m.name) + ", \"compute_capability\": " + std::to_string(m.capability) + ", \"processors\": " +
         std::to_string(m.processors) + ", \"l2_mib\": " + std::to_string(m.l2_bytes >> 20) + ", \"driver\": " + quoted(m.driver) + ", \"cuda\": " +
         quoted(m.cuda) + ", \"cublas\": " + (g.cublas ? quoted(g.cublas->version()) : "null") + ", \"commit\": " + quoted(kCommit) +
         ", \"cold_mib\": " + std::to_string(g.cold >> 20) + ", \"copy_gb_s\": " + real(g.ceilings.copy_gb_s) + ", \"fp16_gop_s\": " +
         real(g.ceilings.fp16_gop_s) + ", \"int8_gop_s\": " + real(g.ceilings.int8_gop_s) + "}";
}

void print_machine(const Gpu& g) {
  std::printf("%s, compute capability %d.%d, driver %s, CUDA %s, commit %s", g.machine.name.c_str(), g.machine.capability / 10,
              g.machine.capability % 10, g.machine.driver.c_str(), g.machine.cuda.c_str(), kCommit);
  if (!g.ceilings.copy_gb_s) return std::puts("\n"), void();
  std::printf(": copies %.0f GB/s; ", *g.ceilings.copy_gb_s);
  if (g.cublas)
    std::printf("%s: FP16 %s, INT8 %s GOP/s", g.cublas->version().c_str(), real(g.ceilings.fp16_gop_s).c_str(), real(g.ceilings.int8_gop_s).c_str());
  else
    std::printf("no libcublasLt is found, so products have no ceiling");
  std::printf(". Weights rotate through %zu MiB.\n\n", g.cold >> 20);
}

}  // namespace

int run_on_gpu(const Options& o) {
  if (const char* why = pe::missing(pe::Arch::sm80)) throw std::runtime_error(why);
  Gpu g{gpu::machine(), Cublas::load(), {}, 0};
  if (!o.check_only) {
    g.ceilings = gpu::measure_ceilings(g.cublas.get());
    g.cold = o.cold_given ? o.cold_bytes : 2 * g.machine.l2_bytes;
  }
  if (!o.json) print_machine(g), print_header(true);
  std::vector<Line> lines;
  each_op(o.op, [&]<class Op>(const char* name) {
    if constexpr (gpu::measured<Op>) measure_op<Op>(name, o, g, lines);
  });
  if (!o.json) return 0;
  std::printf("{\"machine\": %s, \"rows\": [", json(g).c_str());
  for (size_t i = 0; i < lines.size(); ++i) std::printf("%s\n%s", i ? "," : "", json(lines[i]).c_str());
  std::puts("]}");
  return 0;
}

}  // namespace bench
