#include "report.h"

#include <cmath>
#include <cstdio>

namespace bench {
namespace {

const char* kColumns = "%-9s %-20s %-8s %-26s %10s %8s %9s %8s %10s %10s %9s\n";

const char* dtype_name(pe::Dtype dtype) { return dtype == pe::Dtype::f32 ? "f32" : dtype == pe::Dtype::f16 ? "f16" : "bf16"; }

bool has_heads(const Line& l) { return l.op == "attention" || l.op == "rope_kv"; }

}  // namespace

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

void print_header(bool on_gpu) {
  std::printf(kColumns, "op", "kernel", "layer", "shape", "us", "GB/s", "GOP/s", "of peak", on_gpu ? "fp16 us" : "fp32 us",
              on_gpu ? "fp16 x" : "bf16 us", "error");
}

void print(const Line& l) {
  const Spec& s = l.spec;
  char shape[64], columns[7][24];
  if (s.k)
    std::snprintf(shape, sizeof shape, "%lldx%lldx%lld w%da%d g%lld", (long long)s.m, (long long)s.n, (long long)s.k, s.bits, s.act_bits,
                  (long long)s.group);
  else if (s.a)
    std::snprintf(shape, sizeof shape, "%lld, %lldx%lld a%d", (long long)s.m, (long long)s.a, (long long)s.b, s.act_bits);
  else if (has_heads(l))
    std::snprintf(shape, sizeof shape, "%lld, %lld/%lld heads of %lld", (long long)s.m, (long long)s.heads, (long long)s.kv_heads,
                  (long long)s.head_dim);
  else
    std::snprintf(shape, sizeof shape, "%lldx%lld", (long long)s.m, (long long)s.n);
  auto column = [&](int i, const char* format, std::optional<double> value) {
    value ? std::snprintf(columns[i], sizeof columns[i], format, *value) : std::snprintf(columns[i], sizeof columns[i], "-");
  };
  column(0, "%.1f", l.us), column(1, "%.2f", l.gb_s), column(2, "%.1f", l.gop_s);
  column(3, "%.0f %%", l.of_peak ? std::optional(*l.of_peak * 100) : std::nullopt);
  const auto other = !l.on_gpu() ? l.fp32_us : s.a ? l.apart_us : l.fp16_us;
  column(4, "%.1f", other);
  if (l.on_gpu())
    column(5, "%.2f", other && l.us ? std::optional(*other / *l.us) : std::nullopt);
  else
    column(5, "%.1f", l.bf16_us);
  column(6, "%.1e", l.error);
  std::printf(kColumns, l.op.c_str(), l.kernel.c_str(), s.label.c_str(), shape, columns[0], columns[1], columns[2], columns[3], columns[4],
              columns[5], columns[6]);
  std::fflush(stdout);
}

std::string json(const Line& l) {
  const Spec& s = l.spec;
  std::string out = "{\"op\": " + quoted(l.op) + ", \"kernel\": " + quoted(l.kernel) + ", \"layer\": " + quoted(s.label);
  auto add = [&](const char* key, const std::string& value) { out += std::string(", \"") + key + "\": " + value; };
  auto whole = [&](const char* key, int64_t value) { add(key, std::to_string(value)); };
  add("dtype", quoted(dtype_name(s.dtype))), whole("m", s.m);
  if (s.k) {
    whole("n", s.n), whole("k", s.k), whole("bits", s.bits), whole("act_bits", s.act_bits), whole("group", s.group);
    add("outliers", real(s.outliers)), add("columns", real(s.columns)), add("mask", s.skewed ? "\"skewed\"" : "\"uniform\"");
  } else if (s.a) {
    whole("a", s.a), whole("b", s.b), whole("act_bits", s.act_bits);
    add("before", s.norm ? "\"norm\"" : s.gated ? "\"silu_mul\"" : "null");
  } else if (has_heads(l)) {
    whole("heads", s.heads), whole("kv_heads", s.kv_heads), whole("head_dim", s.head_dim), whole("context", s.m > 16 ? s.m : s.context);
  } else {
    whole("n", s.n);
  }
  whole("copies", l.copies);
  add("us", real(l.us)), add("gb_s", real(l.gb_s)), add("gop_s", real(l.gop_s)), add("of_peak", real(l.of_peak));
  if (l.on_gpu())
    add("fp16_us", real(l.fp16_us)), add("int8_us", real(l.int8_us)), add("apart_us", real(l.apart_us));
  else
    add("fp32_us", real(l.fp32_us)), add("bf16_us", real(l.bf16_us));
  add("error", real(l.error));
  return out + "}";
}

}  // namespace bench
