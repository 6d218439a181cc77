// qbench: checks and times the kernels of the dispatch table without Python. `qbench --help` explains options and columns.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <optional>

#include "cpu/threads.h"
#include "dense.h"
#include "options.h"
#include "problem.h"
#include "roofline.h"

namespace bench {
namespace {

constexpr int kLeastRuns = 20, kMostRuns = 1000;
constexpr double kSecondsPerRow = 0.3;  // many runs of a short op: one is shorter than a scheduler's whim

struct Line {
  std::string op, kernel;
  Spec spec;
  double us = 0, gb_s = 0, gop_s = 0;
  std::optional<double> of_peak = {}, fp32_us = {}, bf16_us = {}, error = {};
  int copies = 1;
};

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') out += '\\';
    out += c;
  }
  return out + '"';
}

std::string real(std::optional<double> value) {
  if (!value || !std::isfinite(*value)) return "null";
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", *value);
  return text;
}

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
    if (problem.op().act_bits == 8) rate = roofline.int_gop_s();
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
  const auto prepared = problem.prepare(kernel, o.cold_bytes);
  line.copies = int(prepared.copies.size());
  line.us = timed(line.copies, [&](int i) { kernel.run(prepared.copies[size_t(i)], nullptr); });
  line.gb_s = problem.bytes() / line.us / 1e3, line.gop_s = problem.operations() / line.us / 1e3;
  if (const auto least = least_us(problem, roofline, o.cold_bytes)) line.of_peak = *least / line.us;
  return line;
}

// The rows to time: the one that is named, else all that can run the problem but the oracle.
template <class Op>
std::vector<const pe::Kernel<Op>*> chosen(const Op& op, const std::string& named) {
  if (!named.empty()) {
    const auto& kernel = pe::choose(op, named);
    if (kernel.device != pe::Device::cpu) throw std::runtime_error(named + " runs on a GPU, whose kernels qbench does not time");
    return {&kernel};
  }
  std::vector<const pe::Kernel<Op>*> all;
  for (const auto& kernel : pe::kernels<Op>())
    if (kernel.device == pe::Device::cpu && kernel.rank > 0 && pe::refusal(kernel, op).empty()) all.push_back(&kernel);
  if (all.empty()) all.push_back(&pe::choose(op));
  return all;
}

const char* kColumns = "%-9s %-18s %-8s %-26s %10s %8s %9s %8s %10s %10s %9s\n";

void print_header() {
  std::printf(kColumns, "op", "kernel", "layer", "shape", "us", "GB/s", "GOP/s", "of peak", "fp32 us", "bf16 us", "error");
}

void print(const Line& l) {
  const Spec& s = l.spec;
  char shape[64], columns[7][24];
  if (s.k)
    std::snprintf(shape, sizeof shape, "%lldx%lldx%lld w%da%d g%lld", (long long)s.m, (long long)s.n, (long long)s.k, s.bits, s.act_bits,
                  (long long)s.group);
  else if (l.op == "attention" || l.op == "rope_kv")
    std::snprintf(shape, sizeof shape, "%lld, %lld/%lld heads of %lld", (long long)s.m, (long long)s.heads, (long long)s.kv_heads,
                  (long long)s.head_dim);
  else
    std::snprintf(shape, sizeof shape, "%lldx%lld", (long long)s.m, (long long)s.n);
  auto column = [&](int i, const char* format, std::optional<double> value) {
    value ? std::snprintf(columns[i], sizeof columns[i], format, *value) : std::snprintf(columns[i], sizeof columns[i], "-");
  };
  column(0, "%.1f", l.us), column(1, "%.2f", l.gb_s), column(2, "%.1f", l.gop_s),
      column(3, "%.0f %%", l.of_peak ? std::optional(*l.of_peak * 100) : std::nullopt);
  column(4, "%.1f", l.fp32_us), column(5, "%.1f", l.bf16_us), column(6, "%.1e", l.error);
  std::printf(kColumns, l.op.c_str(), l.kernel.c_str(), s.label.c_str(), shape, columns[0], columns[1], columns[2], columns[3], columns[4],
              columns[5], columns[6]);
  std::fflush(stdout);
}

std::string json(const Line& l) {
  const Spec& s = l.spec;
  std::string out = "{\"op\": " + quoted(l.op) + ", \"kernel\": " + quoted(l.kernel) + ", \"layer\": " + quoted(s.label);
  auto add = [&](const char* key, const std::string& value) { out += std::string(", \"") + key + "\": " + value; };
  auto whole = [&](const char* key, int64_t value) { add(key, std::to_string(value)); };
  whole("m", s.m);
  if (s.k) {
    whole("n", s.n), whole("k", s.k), whole("bits", s.bits), whole("act_bits", s.act_bits), whole("group", s.group);
    add("outliers", real(s.outliers)), add("columns", real(s.columns)), add("mask", s.skewed ? "\"skewed\"" : "\"uniform\"");
  } else if (l.op == "attention" || l.op == "rope_kv") {
    whole("heads", s.heads), whole("kv_heads", s.kv_heads), whole("head_dim", s.head_dim), whole("context", s.m > 16 ? s.m : s.context);
  } else {
    whole("n", s.n);
  }
  whole("copies", l.copies);
  add("us", real(l.us)), add("gb_s", real(l.gb_s)), add("gop_s", real(l.gop_s)), add("of_peak", real(l.of_peak));
  add("fp32_us", real(l.fp32_us)), add("bf16_us", real(l.bf16_us)), add("error", real(l.error));
  return out + "}";
}

std::string json(const Roofline& r, size_t cold) {
  return "{\"cpu\": " + quoted(cpu_name()) + ", \"threads\": " + std::to_string(pe::threads()) +
         ", \"cold_mib\": " + std::to_string(cold >> 20) + ", \"read_gb_s\": " + real(r.read_gb_s) +
         ", \"fp32_gop_s\": " + real(r.fp32_gop_s) + ", \"vnni_gop_s\": " + real(r.vnni_gop_s) + ", \"bf16_gop_s\": " + real(r.bf16_gop_s) +
         ", \"amx_int8_gop_s\": " + real(r.amx_int8_gop_s) + ", \"amx_bf16_gop_s\": " + real(r.amx_bf16_gop_s) + "}";
}

// These move a few rows with the reference alone: they are listed, not timed.
template <class Op>
constexpr bool benchmarked = !std::is_same_v<Op, pe::Embedding> && !std::is_same_v<Op, pe::ScatterAdd>;

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
  one.template operator()<pe::RopeKV>("rope_kv");
  one.template operator()<pe::Attention>("attention");
  if (!found) throw std::runtime_error("--op is '" + named + "', known are qlinear embedding scatter_add rmsnorm silu_mul rope_kv attention");
}

void list(const Options& o) {
  std::string separator = "{\"kernels\": [";
  each_op(o.op, [&]<class Op>(const char* name) {
    for (const auto& kernel : pe::kernels<Op>()) {
      const char *device = kernel.device == pe::Device::cpu ? "cpu" : "cuda", *why = pe::missing(kernel.arch);
      const std::string layout = kernel.layout == pe::Layout::canonical ? "canonical" : "tile" + std::to_string(int(kernel.layout));
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
  if (o.json) std::puts("]}");
}

// A kernel belongs to one op: its name picks it.
template <class Op>
bool wanted(const Options& o) {
  const auto& rows = pe::kernels<Op>();
  return o.kernel.empty() || std::any_of(rows.begin(), rows.end(), [&](const auto& row) { return o.kernel == row.name; });
}

// Refuses what cannot be run before seconds are spent on the machine's peaks.
void check_names_and_shapes(const Options& o) {
  if (!o.shape.empty() && o.op.empty()) throw std::runtime_error("--shape needs --op, whose shape it is");
  bool known = false;
  each_op(o.op, [&]<class Op>(const char* name) {
    if (!wanted<Op>(o)) return;
    known = true;
    if constexpr (benchmarked<Op>) (void)specs(name, o);
    else if (!o.op.empty()) throw std::runtime_error(std::string(name) + " is only listed: it has no kernel to choose or to time");
  });
  if (!known) throw std::runtime_error("no kernel" + (o.op.empty() ? "" : " of " + o.op) + " is called '" + o.kernel + "'");
}

template <class Op>
void measure_op(const char* name, const Options& o, const Roofline& roofline, std::vector<Line>& lines) {
  if (!wanted<Op>(o)) return;
  for (const Spec& spec : specs(name, o)) {
    const Problem<Op> problem(spec);
    std::optional<double> fp32, bf;
    if constexpr (std::is_same_v<Op, pe::QLinear>) fp32 = dense_us<float>(spec, o.cold_bytes), bf = dense_us<bf16>(spec, o.cold_bytes);
    for (const auto* kernel : chosen(problem.op(), o.kernel)) {
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
  Roofline roofline;
  {
    const Buffer memory(size_t(512) << 20);
    std::memset(memory.as<char>(), 1, memory.bytes());
    roofline = measure_roofline(memory.as<char>(), memory.bytes());
  }
  if (!o.json) {
    std::printf(
        "%s, %d threads: reads %.1f GB/s; fp32 %.0f, bf16 %.0f, vnni %.0f, AMX bf16 %.0f, AMX int8 %.0f GOP/s. Weights rotate through %zu "
        "MiB.\n\n",
        cpu_name().c_str(), pe::threads(), roofline.read_gb_s, roofline.fp32_gop_s, roofline.bf16_gop_s, roofline.vnni_gop_s,
        roofline.amx_bf16_gop_s, roofline.amx_int8_gop_s, o.cold_bytes >> 20);
    print_header();
  }
  const auto lines = measure_all(o, roofline);
  if (!o.json) return 0;
  std::printf("{\"machine\": %s, \"rows\": [", json(roofline, o.cold_bytes).c_str());
  for (size_t i = 0; i < lines.size(); ++i) std::printf("%s\n%s", i ? "," : "", json(lines[i]).c_str());
  std::puts("]}");
  return 0;
}

}  // namespace
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
