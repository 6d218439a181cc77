// Every op in plain scalar C++, summed in double: the oracle that all other kernels are tested against, and what runs where no
// vector kernel can (aarch64). It reads canonical weights and shares no code with the kernels it judges.
#include <algorithm>
#include <cmath>
#include <vector>

#include "cpu/threads.h"
#include "dispatch.h"
#include "half.h"
#include "random.h"

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

// What scale · (code − zero) stands for: a token with act_bits 8 or 4, or a head's key or value in a cache of 8 or 4 bits.
struct Codes {
  std::vector<int> code;
  float scale = 1;
  int zero = 0;
};

float ratio(const float* clip, int side) { return clip ? clip[side] : 1.0f; }

// round(v · 1/scale) + zero within low … high.
void round_codes(Codes& codes, const float* x, int64_t n, int low, int high) {
  const float inverse = codes.scale > 0 ? 1.0f / codes.scale : 0.0f;
  for (int64_t c = 0; c < n; ++c) {
    const float v = std::nearbyint(x[c] * inverse);  // NaN for 0 · infinity, beside values of 1e-37 alone
    codes.code.push_back(std::isnan(v) ? 0 : int(std::clamp(v + float(codes.zero), float(low), float(high))));
  }
}

// Codes of `bits` as activations have them, or those of 8 bits in a cache.
Codes quantize(const float* x, int64_t n, int bits, const float* clip) {
  float high = 0, low = 0;
  for (int64_t c = 0; c < n; ++c) {
    if (!std::isfinite(x[c])) return {std::vector<int>(size_t(n)), NAN};
    high = std::max(high, x[c]), low = std::min(low, x[c]);
  }
  const int most = (1 << (bits - 1)) - 1;
  Codes out{{}, std::max(ratio(clip, 0) * high, ratio(clip, 1) * -low) / float(most)};
  round_codes(out, x, n, -most - 1, most);
  return out;
}

// Codes of 4 bits in a cache.
Codes quantize_with_zero(const float* x, int64_t n, const float* clip) {
  float high = 0, low = 0;
  for (int64_t c = 0; c < n; ++c) {
    if (!std::isfinite(x[c])) return {std::vector<int>(size_t(n)), NAN};
    high = std::max(high, x[c]), low = std::min(low, x[c]);
  }
  high *= ratio(clip, 0), low *= ratio(clip, 1);
  Codes out{{}, (high - low) / 15.0f};
  const float inverse = out.scale > 0 ? 1.0f / out.scale : 0.0f, zero = std::nearbyint(-low * inverse);
  out.zero = std::isnan(zero) ? 0 : int(std::clamp(zero, 0.0f, 15.0f));
  round_codes(out, x, n, 0, 15);
  return out;
}

// The codes of token i that came with the op.
Codes given(const QLinear& op, int64_t i) {
  Codes out{{}, op.x_scale[i]};
  for (int64_t c = 0; c < op.k; ++c) {
    if (op.act_bits == 8) {
      out.code.push_back(static_cast<const int8_t*>(op.x_code)[i * op.k + c]);
    } else {
      const int nibble = static_cast<const uint8_t*>(op.x_code)[i * (op.k / 2) + c / 2] >> (c % 2 * 4) & 15;
      out.code.push_back((nibble ^ 8) - 8);
    }
  }
  return out;
}

Codes token_codes(const QLinear& op, int64_t i) {
  if (op.act_bits == 16) return {};
  return op.x_code ? given(op, i) : quantize(op.x + i * op.x_stride, op.k, op.act_bits, op.act_clip);
}

double dot(const Weights& w, const Codes& token, const float* x, int64_t r) {
  const QLinear& op = w.op;
  double total = 0;
  for (int64_t g = 0; g < op.k / op.group; ++g) {
    const int64_t begin = g * op.group, end = begin + op.group;
    const int zero = w.zero(r, g);
    double sum = 0;
    if (op.act_bits < 16) {
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
    const Codes token = token_codes(op, i);
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

void scatter_add(const ScatterAdd& op, void*) {
  parallel_for(op.m, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < op.n; ++j) op.y[i * op.y_stride + op.column[j]] += op.x[i * op.n + j];
  });
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

void round_columns(const RoundColumns& op, void*) {
  constexpr int64_t tile = RoundColumns::tile, block = RoundColumns::block;
  parallel_for(op.n, 8, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      auto at = [&](int64_t column, int64_t columns) { return (r / tile * columns + column) * tile + r % tile; };
      for (int64_t j = 0; j < op.k; ++j) {
        const float x = op.value[at(j, op.k)], s = op.scale[at(op.group[j], op.groups)], z = op.zero ? op.zero[at(op.group[j], op.groups)] : 0;
        const float code = std::clamp(std::nearbyint(x / s) + z, float(op.low), float(op.high));
        op.code[at(j, op.k)] = uint8_t(code + float(op.excess));
        const float q = op.mask && op.mask[at(j, op.k)] ? half_to_float(float_to_half(x)) : (code - z) * s;
        const float change = q - (op.base ? op.base[at(j, op.k)] : x);
        const float* coupling = op.coupling + j / block * op.k * block + j % block;
        for (int64_t c = j + 1; c < op.k; ++c) op.value[at(c, op.k)] = std::fma(coupling[c * block], change, op.value[at(c, op.k)]);
      }
    }
  });
}

// What the linears of a site read of token i: v, then v through its factors.
std::vector<double> site_input(const Transform& op, int64_t i) {
  const float* x = op.x + i * op.x_stride;
  std::vector<double> v(x, x + op.n);
  if (op.gated)
    for (int64_t c = 0; c < op.n; ++c) v[size_t(c)] = double(x[c]) / (1 + std::exp(-double(x[c]))) * x[op.n + c];
  if (op.weight) {
    double sum = 0;
    for (double e : v) sum += e * e;
    const double factor = 1 / std::sqrt(sum / double(op.n) + op.eps);
    for (int64_t c = 0; c < op.n; ++c) v[size_t(c)] *= factor * op.weight[c];
  }
  return v;
}

// leftᵀ · v[a,b] · right.
std::vector<double> change_basis(const std::vector<double>& v, int64_t a, int64_t b, const float* left, const float* right) {
  auto product = [&](const std::vector<double>& from, auto at) {
    std::vector<double> to(from.size());
    for (int64_t r = 0; r < a; ++r)
      for (int64_t c = 0; c < b; ++c) to[size_t(r * b + c)] = at(from, r, c);
    return to;
  };
  std::vector<double> t = v;
  if (right)
    t = product(t, [&](const auto& from, int64_t r, int64_t c) {
      double sum = 0;
      for (int64_t j = 0; j < b; ++j) sum += from[size_t(r * b + j)] * right[j * b + c];
      return sum;
    });
  if (left)
    t = product(t, [&](const auto& from, int64_t r, int64_t c) {
      double sum = 0;
      for (int64_t j = 0; j < a; ++j) sum += from[size_t(j * b + c)] * left[j * a + r];
      return sum;
    });
  return t;
}

void transform(const Transform& op, void*) {
  for (int64_t i = 0; i < op.m; ++i) {
    const float *left = static_cast<const float*>(op.left), *right = static_cast<const float*>(op.right);
    const std::vector<double> t = change_basis(site_input(op, i), op.a, op.b, left, right);
    const std::vector<float> rounded(t.begin(), t.end());
    if (op.y) std::copy(rounded.begin(), rounded.end(), op.y + i * op.y_stride);
    if (!op.code) continue;
    const Codes codes = quantize(rounded.data(), op.n, op.bits, op.clip);
    op.scale[i] = codes.scale;
    for (int64_t c = 0; c < op.n; ++c) {
      const int code = codes.code[size_t(c)];
      if (op.bits == 8) {
        static_cast<int8_t*>(op.code)[i * op.n + c] = int8_t(code);
      } else {
        uint8_t& pair = static_cast<uint8_t*>(op.code)[i * (op.n / 2) + c / 2];
        pair = c % 2 ? uint8_t((pair & 15) | (code & 15) << 4) : uint8_t(code & 15);
      }
    }
  }
}

// The keys or the values of a cache.
struct Half {
  const KVCache& cache;
  void* data;
  float* scale;
  uint8_t* zero;
  const float* clip;  // of what is written
  int64_t d;

  // Element `at`, and the write of a head's d elements from there on.
  double get(int64_t at) const {
    if (cache.bits == 8) return double(static_cast<const int8_t*>(data)[at]) * scale[at / d];
    if (cache.bits == 4) return double((static_cast<const uint8_t*>(data)[at / 2] >> (at % 2 * 4) & 15) - zero[at / d]) * scale[at / d];
    return half_to_float(static_cast<const uint16_t*>(data)[at]);
  }

  void put(const float* x, int64_t at) const {
    if (cache.bits == 16) {
      for (int64_t c = 0; c < d; ++c) static_cast<uint16_t*>(data)[at + c] = float_to_half(x[c]);
      return;
    }
    const Codes codes = cache.bits == 8 ? quantize(x, d, 8, nullptr) : quantize_with_zero(x, d, clip);
    scale[at / d] = codes.scale;
    for (int64_t c = 0; c < d && cache.bits == 8; ++c) static_cast<int8_t*>(data)[at + c] = int8_t(codes.code[size_t(c)]);
    if (cache.bits == 8) return;
    zero[at / d] = uint8_t(codes.zero);
    for (int64_t c = 0; c < d; c += 2) static_cast<uint8_t*>(data)[(at + c) / 2] = uint8_t(codes.code[size_t(c)] | codes.code[size_t(c + 1)] << 4);
  }
};

Half keys(const KVCache& c, int64_t d, const float* clip = nullptr) { return {c, c.k, c.k_scale, c.k_zero, clip, d}; }
Half values(const KVCache& c, int64_t d, const float* clip = nullptr) { return {c, c.v, c.v_scale, c.v_zero, clip, d}; }

void rope_kv(const RopeKV& op, void*) {
  const int64_t d = op.head_dim, half = d / 2;
  for (int64_t i = 0; i < op.m; ++i) {
    float* row = op.qkv + i * op.qkv_stride;
    for (int64_t h = 0; h < op.heads + op.kv_heads; ++h) {
      float* head = row + h * d;
      std::vector<double> turned(static_cast<size_t>(d));
      for (int64_t c = 0; c < half; ++c) {
        const double cos = op.cos[op.position[i] * half + c], sin = op.sin[op.position[i] * half + c];
        turned[size_t(c)] = head[c] * cos - head[half + c] * sin, turned[size_t(half + c)] = head[half + c] * cos + head[c] * sin;
      }
      const void* basis = h < op.heads ? op.q_transform : op.k_transform;
      turned = change_basis(turned, 1, d, nullptr, static_cast<const float*>(basis));
      std::copy(turned.begin(), turned.end(), head);
    }
    for (int64_t h = 0; h < op.kv_heads; ++h) {
      const int64_t at = op.slot[i] * op.cache.slot_stride + h * op.cache.head_stride + op.position[i] * d;
      const float* k = row + (op.heads + h) * d;
      keys(op.cache, d, op.k_clip).put(k, at);
      values(op.cache, d, op.v_clip).put(k + op.kv_heads * d, at);
    }
  }
}

void attention(const Attention& op, void*) {
  const int64_t d = op.head_dim, share = op.heads / op.kv_heads;
  const Half key = keys(op.cache, d), value = values(op.cache, d);
  parallel_for(op.m * op.heads, 1, [&](int64_t from, int64_t to) {
    for (int64_t task = from; task < to; ++task) {
      const int64_t i = task / op.heads, h = task % op.heads, length = op.position[i] + 1;
      const int64_t base = op.slot[i] * op.cache.slot_stride + h / share * op.cache.head_stride;
      std::vector<double> score(static_cast<size_t>(length)), out(static_cast<size_t>(d));
      double top = -INFINITY, sum = 0;
      for (int64_t t = 0; t < length; ++t) {
        double s = 0;
        for (int64_t c = 0; c < d; ++c) s += double(op.q[i * op.q_stride + h * d + c]) * key.get(base + t * d + c);
        score[size_t(t)] = s * op.scale;
        top = std::max(top, score[size_t(t)]);
      }
      for (int64_t t = 0; t < length; ++t) {
        const double p = std::exp(score[size_t(t)] - top);
        sum += p;
        for (int64_t c = 0; c < d; ++c) out[size_t(c)] += p * value.get(base + t * d + c);
      }
      for (int64_t c = 0; c < d; ++c) op.y[i * op.y_stride + h * d + c] = float(out[size_t(c)] / sum);
    }
  });
}

void sample(const Sample& op, void*) {
  for (int64_t i = 0; i < op.m; ++i) {
    const float* logits = op.logits + i * op.stride;
    const bool broken = std::any_of(logits, logits + op.n, [](float l) { return !(l < INFINITY); });
    const float largest = *std::max_element(logits, logits + op.n), temperature = op.temperature ? op.temperature[i] : 0;
    float best = -INFINITY;
    int64_t token = -1;
    for (int64_t c = 0; c < op.n && !broken; ++c) {
      float key = logits[c];
      if (temperature > 0) {
        const auto four = random::philox({{uint32_t(c / 4), uint32_t(op.position[i]), 0, 0}}, uint64_t(op.seed[i]));
        key = random::race((key - largest) / temperature, four.word[c % 4]);
      }
      if (key > best) best = key, token = c;
    }
    op.token[i] = token;
  }
}

constexpr auto cpu = Device::cpu;
constexpr auto plain = Layout::canonical;

const Row<QLinear> qlinear_row{{"qlinear_reference", cpu, Arch::any, 0, plain, nullptr, qlinear}};
const Row<ScatterAdd> scatter_add_row{{"scatter_add_reference", cpu, Arch::any, 0, plain, nullptr, scatter_add}};
const Row<RmsNorm> rmsnorm_row{{"rmsnorm_reference", cpu, Arch::any, 0, plain, nullptr, rmsnorm}};
const Row<RoundColumns> round_columns_row{{"round_columns_reference", cpu, Arch::any, 0, plain, nullptr, round_columns}};
const Row<SiluMul> silu_mul_row{{"silu_mul_reference", cpu, Arch::any, 0, plain, nullptr, silu_mul}};
const Row<Transform> transform_row{{"transform_reference", cpu, Arch::any, 0, plain, nullptr, transform}};
const Row<RopeKV> rope_kv_row{{"rope_kv_reference", cpu, Arch::any, 0, plain, nullptr, rope_kv}};
const Row<Attention> attention_row{{"attention_reference", cpu, Arch::any, 0, plain, nullptr, attention}};
const Row<Sample> sample_row{{"sample_reference", cpu, Arch::any, 0, plain, nullptr, sample}};

}  // namespace
}  // namespace pe
