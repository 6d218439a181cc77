// What the problems of all ops are made of: random operands, cold copies, the oracle and the norm of an error.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>
#include <stdexcept>

#include "half.h"
#include "problem.h"

namespace bench {

inline size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

// splitmix64: fast enough to fill gigabytes.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t operator()() {
    uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  float uniform() { return float((*this)() >> 40) * 0x1p-24f; }
  static constexpr uint64_t min() { return 0; }
  static constexpr uint64_t max() { return ~uint64_t(0); }
  using result_type = uint64_t;

 private:
  uint64_t state_;
};

template <class T>
T* keep(std::vector<Buffer>& owned, size_t count) {
  owned.emplace_back(count * sizeof(T));
  return owned.back().as<T>();
}

// f16 or bf16, nearest even, and back.
inline uint16_t to_bits(float value, pe::Dtype dtype) {
  if (dtype == pe::Dtype::f16) return pe::float_to_half(value);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_bits(uint16_t value, pe::Dtype dtype) {
  if (dtype == pe::Dtype::f16) return pe::half_to_float(value);
  const uint32_t bits = uint32_t(value) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

inline float* random_floats(std::vector<Buffer>& owned, Random& random, size_t count, pe::Dtype dtype = pe::Dtype::f32) {
  float* f = keep<float>(owned, count);
  for (size_t i = 0; i < count; ++i) {
    const float value = random.uniform() * 2 - 1;
    f[i] = dtype == pe::Dtype::f32 ? value : from_bits(to_bits(value, dtype), dtype);
  }
  return f;
}
inline double value_bytes(const Spec& s) { return s.dtype == pe::Dtype::f32 ? 4 : 2; }

inline uint16_t* random_halves(std::vector<Buffer>& owned, Random& random, size_t count) {
  uint16_t* h = keep<uint16_t>(owned, count);
  for (size_t i = 0; i < count; ++i) h[i] = pe::float_to_half(random.uniform() * 2 - 1);
  return h;
}

// The workspace of an op that has one.
template <class Op>
void give_workspace(Op& op, std::vector<Buffer>& owned) {
  if constexpr (requires { op.workspace = nullptr; }) op.workspace = keep<uint8_t>(owned, pe::workspace_bytes(op));
}

// An operand that is read cold: `bytes` at a member of the op.
template <class Op>
struct Cold {
  size_t bytes;
  const void* from;
  void (*set)(Op&, void*);
};

template <class Op>
void rotate(Prepared<Op>& prepared, const Op& op, const std::vector<Cold<Op>>& parts, size_t cold) {
  size_t each = 0;
  for (const auto& part : parts) each += aligned(part.bytes);
  const size_t count = each ? std::max<size_t>(1, cold / each + (cold % each != 0)) : 1;
  prepared.owned.emplace_back(each * count);
  auto* at = prepared.owned.back().template as<uint8_t>();
  for (size_t i = 0; i < count; ++i) {
    prepared.copies.push_back(op);
    for (const auto& part : parts) {
      if (part.bytes) std::memcpy(at, part.from, part.bytes);
      part.set(prepared.copies.back(), at);
      at += aligned(part.bytes);
    }
  }
}

struct Norms {
  double difference = 0, whole = 0;
  void add(double value, double wanted) {
    if (!(std::isfinite(value) || std::isnan(wanted))) difference = INFINITY;
    difference += (value - wanted) * (value - wanted);
    whole += wanted * wanted;
  }
  double ratio() const { return whole > 0 ? std::sqrt(difference / whole) : std::sqrt(difference); }
};

template <class Op>
const pe::Kernel<Op>& oracle() {
  for (const auto& kernel : pe::kernels<Op>())
    if (kernel.rank == 0 && kernel.device == pe::Device::cpu) return kernel;
  throw std::runtime_error("this build has no reference kernel");
}

// Tokens whose results are compared: all of a short problem, else the ends, the middle and the seam of a chunk.
inline std::vector<int64_t> sample(int64_t m) {
  std::vector<int64_t> all(static_cast<size_t>(m));
  std::iota(all.begin(), all.end(), 0);
  if (m <= 8) return all;
  std::vector<int64_t> some = {0, 1, m / 2, std::min(m - 1, pe::kChunk), m - 2, m - 1};
  std::sort(some.begin(), some.end());
  some.erase(std::unique(some.begin(), some.end()), some.end());
  return some;
}

inline void compare(Norms& norms, const float* y, const float* wanted, int64_t count) {
  for (int64_t i = 0; i < count; ++i) norms.add(y[i], wanted[i]);
}

// ‖y − oracle‖ / ‖oracle‖ of the op without its result: of all rows of y[m, n], and of the rows of a linear that sample() picks.
template <class Op>
double error_of_rows(Op op, const float* y) {
  std::vector<float> wanted(static_cast<size_t>(op.m * op.n));
  op.y = wanted.data();
  oracle<Op>().run(op, nullptr);
  Norms norms;
  compare(norms, y, wanted.data(), op.m * op.n);
  return norms.ratio();
}
inline double error_of_tokens(const pe::QLinear& op, const float* y, int64_t y_stride) {
  std::vector<float> wanted(static_cast<size_t>(op.n));
  Norms norms;
  for (int64_t i : sample(op.m)) {
    pe::QLinear one = op;
    one.m = 1, one.x = op.x + i * op.x_stride, one.y = wanted.data();
    oracle<pe::QLinear>().run(one, nullptr);
    compare(norms, y + i * y_stride, wanted.data(), op.n);
  }
  return norms.ratio();
}
inline double error_of_attention(const pe::Attention& op, const float* y) {
  std::vector<float> wanted(static_cast<size_t>(op.y_stride));
  Norms norms;
  for (int64_t i : sample(op.m)) {
    pe::Attention one = op;
    one.m = 1, one.q = op.q + i * op.q_stride, one.y = wanted.data(), one.slot = op.slot + i, one.position = op.position + i;
    oracle<pe::Attention>().run(one, nullptr);
    compare(norms, y + i * op.y_stride, wanted.data(), op.y_stride);
  }
  return norms.ratio();
}

}  // namespace bench
