// Every op in plain scalar C++, summed in double: the oracle that all other kernels are tested against, and what runs where no
// vector kernel can (aarch64). It reads canonical weights and shares no code with the kernels it judges.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/threads.h"
#include "dispatch.h"
#include "half.h"

namespace pe {
namespace {

struct Weights {
  const QLinear& op;

  int code(int64_t r, int64_t c) const {
    if (op.bits == 8) return op.weight[r * op.k + c];
    return (op.weight[r * ((op.k + 1) / 2) + c / 2] >> (c % 2 * 4)) & 15;
  }
  int zero(int64_t r, int64_t g) const { return op.zero ? op.zero[r * (op.k / op.group) + g] : 1 << (op.bits - 1); }
  double scale(int64_t r, int64_t g) const {
    const int64_t at = r * (op.k / op.group) + g;
    return op.scale_f32 ? static_cast<const float*>(op.scale)[at] : half_to_float(static_cast<const uint16_t*>(op.scale)[at]);
  }
  int64_t column(int64_t e) const {
    return op.k > 65536 ? static_cast<const int32_t*>(op.outlier_col)[e] : static_cast<const uint16_t*>(op.outlier_col)[e];
  }
};

// What scale · code stands for: an activation's token with act_bits 8, or a head's key or value in a cache of 8 bits.
struct Codes {
  std::vector<int> code;
  float scale = 1;
};

Codes quantize(const float* x, int64_t n) {
  float top = 0;
  for (int64_t c = 0; c < n; ++c) {
    if (!std::isfinite(x[c])) return {std::vector<int>(size_t(n)), NAN};
    top = std::max(top, std::fabs(x[c]));
  }
  Codes out{{}, top / 127.0f};
  const float inverse = out.scale > 0 ? 1.0f / out.scale : 0.0f;
  for (int64_t c = 0; c < n; ++c) {
    const float v = std::nearbyint(x[c] * inverse);  // NaN for 0 · infinity, beside values of 1e-37 alone
    out.code.push_back(std::isnan(v) ? 0 : int(std::clamp(v, -127.0f, 127.0f)));
  }
  return out;
}

double dot(const Weights& w, const Codes& token, const float* x, int64_t r) {
  const QLinear& op = w.op;
  double total = 0;
  for (int64_t g = 0; g < op.k / op.group; ++g) {
    const int64_t begin = g * op.group, end = begin + op.group;
    const int zero = w.zero(r, g);
    double sum = 0;
    if (op.act_bits == 8) {
      int64_t exact = 0;
      for (int64_t c = begin; c < end; ++c) exact += int64_t(w.code(r, c) - zero) * token.code[size_t(c)];
      sum = double(exact);
    } else {
      for (int64_t c = begin; c < end; ++c) sum += double(w.code(r, c) - zero) * x[c];
    }
    total += sum * w.scale(r, g);
  }
  return total * token.scale;
}

double output(const Weights& w, const Codes& token, const float* x, int64_t r) {
  const QLinear& op = w.op;
  double y = dot(w, token, x, r);
  if (op.outlier_row)
    for (int64_t e = op.outlier_row[r]; e < op.outlier_row[r + 1]; ++e) y += double(half_to_float(op.outlier_value[e])) * x[w.column(e)];
  for (int64_t j = 0; j < op.columns; ++j) y += double(half_to_float(op.column_value[r * op.columns + j])) * x[op.column_index[j]];
  return op.bias ? y + op.bias[r] : y;
}

void qlinear(const QLinear& op, void*) {
  const Weights w{op};
  const int64_t columns = op.gated ? op.n / 2 : op.n;
  for (int64_t i = 0; i < op.m; ++i) {
    const float* x = op.x + i * op.x_stride;
    const Codes token = op.act_bits == 8 ? quantize(x, op.k) : Codes{};
    parallel_for(columns, 16, [&](int64_t from, int64_t to) {
      for (int64_t r = from; r < to; ++r) {
        double y = output(w, token, x, r);
        if (op.gated) y = y / (1 + std::exp(-y)) * output(w, token, x, columns + r);
        if (op.residual) y += op.residual[i * op.y_stride + r];
        op.y[i * op.y_stride + r] = float(y);
      }
    });
  }
}

void rmsnorm(const RmsNorm& op, void*) {
  for (int64_t i = 0; i < op.m; ++i) {
    const float* x = op.x + (op.row ? op.row[i] : i) * op.n;
    if (float* residual = op.residual ? op.residual + i * op.n : nullptr) {
      for (int64_t c = 0; c < op.n; ++c) residual[c] += x[c];
      x = residual;
    }
    double sum = 0;
    for (int64_t c = 0; c < op.n; ++c) sum += double(x[c]) * x[c];
    const double factor = 1 / std::sqrt(sum / double(op.n) + op.eps);
    for (int64_t c = 0; c < op.n; ++c) op.y[i * op.n + c] = float(x[c] * factor * op.weight[c]);
  }
}

void silu_mul(const SiluMul& op, void*) {
  for (int64_t i = 0; i < op.m; ++i)
    for (int64_t c = 0; c < op.n; ++c) {
      const double gate = op.x[i * 2 * op.n + c], up = op.x[i * 2 * op.n + op.n + c];
      op.y[i * op.n + c] = float(gate / (1 + std::exp(-gate)) * up);
    }
}

// Element `at` of the keys or values of a cache, and the write of a head's d elements from there on.
double cached(const KVCache& cache, const void* from, const float* scale, int64_t at, int64_t d) {
  if (cache.bits == 8) return double(static_cast<const int8_t*>(from)[at]) * scale[at / d];
  return half_to_float(static_cast<const uint16_t*>(from)[at]);
}

void write(const KVCache& cache, const float* x, void* to, float* scale, int64_t at, int64_t d) {
  if (cache.bits == 8) {
    const Codes codes = quantize(x, d);
    scale[at / d] = codes.scale;
    for (int64_t c = 0; c < d; ++c) static_cast<int8_t*>(to)[at + c] = int8_t(codes.code[size_t(c)]);
  } else {
    for (int64_t c = 0; c < d; ++c) static_cast<uint16_t*>(to)[at + c] = float_to_half(x[c]);
  }
}

void rope_kv(const RopeKV& op, void*) {
  const int64_t d = op.head_dim, half = d / 2;
  for (int64_t i = 0; i < op.m; ++i) {
    float* row = op.qkv + i * op.qkv_stride;
    for (int64_t h = 0; h < op.heads + op.kv_heads; ++h)
      for (int64_t c = 0; c < half; ++c) {
        const double cos = op.cos[op.position[i] * half + c], sin = op.sin[op.position[i] * half + c];
        float &a = row[h * d + c], &b = row[h * d + half + c];
        const double first = a * cos - b * sin, second = b * cos + a * sin;
        a = float(first), b = float(second);
      }
    for (int64_t h = 0; h < op.kv_heads; ++h) {
      const int64_t at = op.slot[i] * op.cache.slot_stride + h * op.cache.head_stride + op.position[i] * d;
      const float* k = row + (op.heads + h) * d;
      write(op.cache, k, op.cache.k, op.cache.k_scale, at, d);
      write(op.cache, k + op.kv_heads * d, op.cache.v, op.cache.v_scale, at, d);
    }
  }
}

void attention(const Attention& op, void*) {
  const int64_t d = op.head_dim, share = op.heads / op.kv_heads;
  parallel_for(op.m * op.heads, 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t i = task / op.heads, h = task % op.heads, length = op.position[i] + 1;
      const int64_t base = op.slot[i] * op.cache.slot_stride + h / share * op.cache.head_stride;
      std::vector<double> score(static_cast<size_t>(length)), out(static_cast<size_t>(d));
      double top = -INFINITY, sum = 0;
      for (int64_t t = 0; t < length; ++t) {
        double s = 0;
        for (int64_t c = 0; c < d; ++c) s += double(op.q[i * op.q_stride + h * d + c]) * cached(op.cache, op.cache.k, op.cache.k_scale, base + t * d + c, d);
        score[size_t(t)] = s * op.scale;
        top = std::max(top, score[size_t(t)]);
      }
      for (int64_t t = 0; t < length; ++t) {
        const double p = std::exp(score[size_t(t)] - top);
        sum += p;
        for (int64_t c = 0; c < d; ++c) out[size_t(c)] += p * cached(op.cache, op.cache.v, op.cache.v_scale, base + t * d + c, d);
      }
      for (int64_t c = 0; c < d; ++c) op.y[i * op.y_stride + h * d + c] = float(out[size_t(c)] / sum);
    }
  });
}

constexpr auto cpu = Device::cpu;
constexpr auto plain = Layout::canonical;

const Row<QLinear> qlinear_row{{"qlinear_reference", cpu, Arch::any, 0, plain, nullptr, qlinear}};
const Row<RmsNorm> rmsnorm_row{{"rmsnorm_reference", cpu, Arch::any, 0, plain, nullptr, rmsnorm}};
const Row<SiluMul> silu_mul_row{{"silu_mul_reference", cpu, Arch::any, 0, plain, nullptr, silu_mul}};
const Row<RopeKV> rope_kv_row{{"rope_kv_reference", cpu, Arch::any, 0, plain, nullptr, rope_kv}};
const Row<Attention> attention_row{{"attention_reference", cpu, Arch::any, 0, plain, nullptr, attention}};

}  // namespace
}  // namespace pe
