// The problems of changes of basis: what a site's linears read, as numbers or as codes. All operands but the factors are what the op before
// has just written, and the factors stay in caches; on a GPU they are what memory has.
#include "operands.h"

namespace bench {
namespace {

using pe::Kernel, pe::Transform;

constexpr double kEps = 1e-5;

// A GPU's are f16.
const float* random_factor(std::vector<Buffer>& owned, Random& random, int64_t size, bool on_gpu) {
  float* factor = random_floats(owned, random, size_t(size * size));
  for (int64_t i = 0; i < size * size; ++i) {
    factor[i] /= std::sqrt(float(size));
    if (on_gpu) factor[i] = pe::half_to_float(pe::float_to_half(factor[i]));
  }
  return factor;
}

// What codes of `op` stand for.
std::vector<float> numbers(const Transform& op) {
  std::vector<float> all(size_t(op.m * op.n));
  for (int64_t i = 0; i < op.m * op.n; ++i) {
    int code = op.bits == 8 ? static_cast<const int8_t*>(op.code)[i] : static_cast<const uint8_t*>(op.code)[i / 2] >> (i % 2 * 4) & 15;
    if (op.bits == 4) code = (code ^ 8) - 8;
    all[size_t(i)] = float(code) * op.scale[i / op.n];
  }
  return all;
}

}  // namespace

template <>
Problem<Transform>::Problem(const Spec& s) {
  Random random(1);
  op_.m = s.m, op_.n = s.a * s.b, op_.a = s.a, op_.b = s.b;
  const bool on_gpu = s.dtype != pe::Dtype::f32;
  op_.gated = s.gated, op_.x_stride = s.gated ? 2 * op_.n : op_.n;
  op_.x = random_floats(owned_, random, size_t(op_.m * op_.x_stride), s.dtype);
  value_bytes_ = value_bytes(s);
  if (s.norm) op_.weight = random_floats(owned_, random, size_t(op_.n)), op_.eps = float(kEps);
  op_.left = random_factor(owned_, random, s.a, on_gpu);
  if (!s.left_alone) op_.right = random_factor(owned_, random, s.b, on_gpu);
  if (s.act_bits == 16) {
    op_.y = keep<float>(owned_, size_t(op_.m * op_.n)), op_.y_stride = op_.n;
  } else {
    op_.bits = s.act_bits, op_.code = keep<uint8_t>(owned_, size_t(op_.m * op_.n)), op_.scale = keep<float>(owned_, size_t(op_.m));
  }
}

template <>
double Problem<Transform>::operations() const {
  return 2.0 * double(op_.m * op_.n) * double(op_.a + (op_.right ? op_.b : 0));
}

template <>
double Problem<Transform>::bytes() const {
  const double factors = value_bytes_ * double(op_.a * op_.a + (op_.right ? op_.b * op_.b : 0));
  return double(op_.m) * (value_bytes_ * double(op_.x_stride) + double(op_.n) * (op_.y ? value_bytes_ : op_.bits / 8.0)) + factors;
}

template <>
double Problem<Transform>::cold_bytes() const {
  return value_bytes_ < 4 ? bytes() : 0;
}

template <>
Prepared<Transform> Problem<Transform>::prepare(const Kernel<Transform>&, size_t) const {
  Prepared<Transform> prepared;
  prepared.copies.push_back(op_);
  return prepared;
}

// Codes must be those of the kernel's own numbers, whose error is what may be large.
template <>
double Problem<Transform>::error(const Kernel<Transform>& kernel) const {
  std::vector<float> y(size_t(op_.m * op_.n));
  Transform op = op_;
  op.y = y.data(), op.y_stride = op.n;
  kernel.run(op, nullptr);
  Transform plain = op;
  plain.code = nullptr;
  const double of_numbers = error_of_rows(plain, y.data());
  if (!op.code) return of_numbers;
  const std::vector<float> mine = numbers(op);
  Transform quantizer = op;
  quantizer.x = y.data(), quantizer.x_stride = op.n, quantizer.y = nullptr, quantizer.left = quantizer.right = nullptr, quantizer.weight = nullptr;
  oracle<Transform>().run(quantizer, nullptr);
  return mine == numbers(quantizer) ? of_numbers : INFINITY;
}

}  // namespace bench
