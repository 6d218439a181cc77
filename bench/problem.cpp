// The problems of linears, norms and activations.
#include <cstdlib>
#include <random>

#include "operands.h"
#include "pages.h"

namespace bench {
namespace {

using pe::Kernel, pe::QLinear, pe::RmsNorm, pe::SiluMul;

// The chance of each row and column to hold an outlier: chance(r, c) = min(fullest, row[r] * column[c]), `share` on average.
struct Density {
  std::vector<float> row, column;
  static constexpr float fullest = 0.97f;

  Density(const Spec& s, Random& random) : row(size_t(s.n), 1), column(size_t(s.k), float(s.outliers)) {
    if (!s.skewed || s.outliers == 0) return;
    // Log-normal with the deviations that give what was measured on SmolLM2-135M (bench/random_model.py says how).
    std::lognormal_distribution<float> of_row(0, 1.3f), of_column(0, 2.2f);
    for (auto& r : row) r = of_row(random);
    for (auto& c : column) c = of_column(random);
    const size_t step = std::max<size_t>(1, row.size() / 256);
    for (int pass = 0; pass < 12; ++pass) {  // what is cut off at the fullest goes to the others
      double sum = 0, count = 0;
      for (size_t r = 0; r < row.size(); r += step, count += double(s.k))
        for (float c : column) sum += std::min(fullest, row[r] * c);
      for (auto& r : row) r *= float(s.outliers * count / sum);
    }
  }
};

void put_zero_code(const QLinear& op, uint8_t* weight, int64_t r, int64_t c) {
  if (op.bits == 8) {
    weight[r * op.k + c] = 128;
  } else {
    uint8_t& pair = weight[r * ((op.k + 1) / 2) + c / 2];
    pair = uint8_t(c % 2 ? (pair & 0x0f) | 0x80 : (pair & 0xf0) | 0x08);
  }
}

// Whole inputs, spread evenly: where they lie costs nothing.
void add_columns(QLinear& op, const Spec& s, uint8_t* weight, std::vector<Buffer>& owned, Random& random) {
  op.columns = int64_t(s.columns * double(op.k));
  auto* index = keep<int32_t>(owned, size_t(op.columns));
  for (int64_t j = 0; j < op.columns; ++j) {
    index[j] = int32_t(j * op.k / op.columns);
    for (int64_t r = 0; r < op.n; ++r) put_zero_code(op, weight, r, index[j]);
  }
  op.column_index = index;
  op.column_value = random_halves(owned, random, size_t(op.n * op.columns));
}

void add_outliers(QLinear& op, const Spec& s, uint8_t* weight, std::vector<Buffer>& owned, Random& random) {
  const Density density(s, random);
  std::vector<int32_t> start(1, 0), columns;
  for (int64_t r = 0; r < op.n; ++r) {
    for (int64_t c = 0; c < op.k; ++c) {
      if (random.uniform() >= std::min(density.fullest, density.row[size_t(r)] * density.column[size_t(c)])) continue;
      if (std::binary_search(op.column_index, op.column_index + op.columns, int32_t(c))) continue;
      columns.push_back(int32_t(c));
      put_zero_code(op, weight, r, c);
    }
    start.push_back(int32_t(columns.size()));
  }
  auto* row = keep<int32_t>(owned, start.size());
  std::copy(start.begin(), start.end(), row);
  if (op.k > 65536) {
    auto* col = keep<int32_t>(owned, columns.size());
    std::copy(columns.begin(), columns.end(), col);
    op.outlier_col = col;
  } else {
    auto* col = keep<uint16_t>(owned, columns.size());
    std::copy(columns.begin(), columns.end(), col);
    op.outlier_col = col;
  }
  op.outlier_row = row;
  op.outlier_value = random_halves(owned, random, columns.size());
}

int64_t outliers_of(const QLinear& op) { return op.outlier_row ? op.outlier_row[op.n] : 0; }
size_t column_bytes(const QLinear& op) { return op.k > 65536 ? 4 : 2; }

}  // namespace

Buffer::Buffer(size_t bytes) : bytes_(bytes) {
  constexpr size_t kPage = size_t(2) << 20;
  const size_t room = aligned(bytes) + 64;  // kernels may read a vector from the last byte on
  const bool large = room >= kPage;         // in large pages, as the runtime's weights are
  data_.reset(std::aligned_alloc(large ? kPage : 64, large ? (room + kPage - 1) / kPage * kPage : room));
  if (!data_) throw std::bad_alloc();
  if (large) pe::advise_large_pages(data_.get(), room);
}
void Buffer::Free::operator()(void* p) const { std::free(p); }

// ---- QLinear

template <>
Problem<QLinear>::Problem(const Spec& s) {
  Random random(1);
  op_.m = s.m, op_.n = s.n, op_.k = s.k, op_.group = s.group, op_.bits = s.bits, op_.act_bits = s.act_bits;
  const size_t width = size_t(s.bits == 8 ? s.k : (s.k + 1) / 2), bytes = size_t(s.n) * width;
  auto* weight = keep<uint8_t>(owned_, aligned(bytes));
  for (size_t i = 0; i < bytes; i += 8) {
    const uint64_t codes = random();
    std::memcpy(weight + i, &codes, 8);
  }
  op_.weight = weight;
  const size_t scales = size_t(s.n * (s.k / s.group));
  auto* scale = keep<uint16_t>(owned_, scales);
  for (size_t i = 0; i < scales; ++i) scale[i] = pe::float_to_half(0.002f * (1 + random.uniform()));
  op_.scale = scale;
  if (s.columns > 0) add_columns(op_, s, weight, owned_, random);
  if (s.outliers > 0) add_outliers(op_, s, weight, owned_, random);
  op_.x = random_floats(owned_, random, size_t(s.m * s.k), s.dtype), op_.x_stride = s.k;
  value_bytes_ = value_bytes(s);
  op_.y = keep<float>(owned_, size_t(s.m * s.n)), op_.y_stride = s.n;
  give_workspace(op_, owned_);
}

template <>
double Problem<QLinear>::operations() const {
  return 2.0 * double(op_.m) * (double(op_.n) * double(op_.k + op_.columns) + double(outliers_of(op_)));
}

template <>
double Problem<QLinear>::cold_bytes() const {
  const double weight = double(op_.n) * double(op_.k) * op_.bits / 8, scale = 2.0 * double(op_.n * (op_.k / op_.group));
  const double sparse = op_.outlier_row ? 4.0 * double(op_.n + 1) + double(outliers_of(op_)) * double(column_bytes(op_) + 2) : 0;
  return weight + scale + sparse + double(op_.columns) * (4 + 2.0 * double(op_.n));
}

template <>
double Problem<QLinear>::bytes() const {
  // A GPU's linears read codes that are there already.
  const double x = value_bytes_ < 4 && op_.act_bits < 16 ? op_.act_bits / 8.0 : value_bytes_;
  return cold_bytes() + double(op_.m) * (value_bytes_ * double(op_.n) + x * double(op_.k));
}

template <>
Prepared<QLinear> Problem<QLinear>::prepare(const Kernel<QLinear>& kernel, size_t cold) const {
  Prepared<QLinear> prepared;
  QLinear op = op_;
  const size_t width = size_t(op.bits == 8 ? op.k : (op.k + 1) / 2);
  pe::PackedBytes bytes{size_t(op.n) * width, size_t(op.n * (op.k / op.group)) * 2, 0};
  if (kernel.layout != pe::Layout::canonical) {
    bytes = pe::packed_bytes(op_, kernel.layout);
    auto *weight = keep<uint8_t>(prepared.owned, bytes.weight), *scale = keep<uint8_t>(prepared.owned, bytes.scale);
    pe::pack(op_, kernel.layout, weight, scale, nullptr);
    op.layout = kernel.layout, op.weight = weight, op.scale = scale;
  }
  std::vector<Cold<QLinear>> parts = {
      {bytes.weight, op.weight, [](QLinear& o, void* at) { o.weight = static_cast<uint8_t*>(at); }},
      {bytes.scale, op.scale, [](QLinear& o, void* at) { o.scale = at; }},
  };
  if (op.outlier_row && op.layout != pe::Layout::canonical) {
    const pe::OutlierBytes size = pe::outlier_band_bytes(op_, kernel.layout);
    auto* band = keep<pe::OutlierBand>(prepared.owned, size.band / sizeof(pe::OutlierBand));
    auto* run = keep<pe::OutlierRun>(prepared.owned, size.run / sizeof(pe::OutlierRun));
    auto* vector = keep<uint8_t>(prepared.owned, size.vector);
    pe::pack_outlier_bands(op_, kernel.layout, band, run, vector);
    op.outlier_band = band, op.outlier_run = run, op.outlier_vector = vector;
    parts.push_back({size.band, band, [](QLinear& o, void* at) { o.outlier_band = static_cast<pe::OutlierBand*>(at); }});
    parts.push_back({size.run, run, [](QLinear& o, void* at) { o.outlier_run = static_cast<pe::OutlierRun*>(at); }});
    parts.push_back({size.vector, vector, [](QLinear& o, void* at) { o.outlier_vector = static_cast<uint8_t*>(at); }});
  }
  if (op.columns) {
    size_t count = size_t(op.n * op.columns);
    if (op.layout != pe::Layout::canonical) {
      count = pe::column_count(op_, kernel.layout);
      auto* value = keep<uint16_t>(prepared.owned, count);
      pe::pack_columns(op_, kernel.layout, value);
      op.column_value = value;
    }
    parts.push_back({count * 2, op.column_value, [](QLinear& o, void* at) { o.column_value = static_cast<uint16_t*>(at); }});
  }
  if (op.outlier_row) {
    const size_t count = size_t(outliers_of(op));
    parts.push_back({size_t(op.n + 1) * 4, op.outlier_row, [](QLinear& o, void* at) { o.outlier_row = static_cast<int32_t*>(at); }});
    parts.push_back({count * column_bytes(op), op.outlier_col, [](QLinear& o, void* at) { o.outlier_col = at; }});
    parts.push_back({count * 2, op.outlier_value, [](QLinear& o, void* at) { o.outlier_value = static_cast<uint16_t*>(at); }});
  }
  rotate(prepared, op, parts, cold);
  return prepared;
}

template <>
double Problem<QLinear>::error(const Kernel<QLinear>& kernel) const {
  const auto prepared = prepare(kernel, 0);
  kernel.run(prepared.copies[0], nullptr);
  return error_of_tokens(op_, op_.y, op_.y_stride);
}

// ---- RmsNorm and SiluMul: their operands are a few vectors that the op before has just written, so they stay warm.

template <>
Problem<RmsNorm>::Problem(const Spec& s) {
  Random random(1);
  op_.m = s.m, op_.n = s.n, op_.eps = 1e-5f;
  op_.x = random_floats(owned_, random, size_t(s.m * s.n), s.dtype);
  value_bytes_ = value_bytes(s);
  op_.weight = random_floats(owned_, random, size_t(s.n));
  op_.y = keep<float>(owned_, size_t(s.m * s.n));
}
template <>
double Problem<RmsNorm>::operations() const {
  return 4.0 * double(op_.m) * double(op_.n);
}
template <>
double Problem<RmsNorm>::bytes() const {
  return (2 * value_bytes_ * double(op_.m) + 4) * double(op_.n);
}

template <>
Problem<SiluMul>::Problem(const Spec& s) {
  Random random(1);
  op_.m = s.m, op_.n = s.n;
  op_.x = random_floats(owned_, random, size_t(s.m * 2 * s.n), s.dtype);
  value_bytes_ = value_bytes(s);
  op_.y = keep<float>(owned_, size_t(s.m * s.n));
}
template <>
double Problem<SiluMul>::operations() const {
  return 4.0 * double(op_.m) * double(op_.n);
}
template <>
double Problem<SiluMul>::bytes() const {
  return 3 * value_bytes_ * double(op_.m) * double(op_.n);
}

namespace {
template <class Op>
Prepared<Op> warm(const Op& op) {
  Prepared<Op> prepared;
  prepared.copies.push_back(op);
  return prepared;
}
}  // namespace
template <>
double Problem<RmsNorm>::cold_bytes() const {
  return 0;
}
template <>
double Problem<SiluMul>::cold_bytes() const {
  return 0;
}
template <>
Prepared<RmsNorm> Problem<RmsNorm>::prepare(const Kernel<RmsNorm>&, size_t) const {
  return warm(op_);
}
template <>
Prepared<SiluMul> Problem<SiluMul>::prepare(const Kernel<SiluMul>&, size_t) const {
  return warm(op_);
}
template <>
double Problem<RmsNorm>::error(const Kernel<RmsNorm>& kernel) const {
  kernel.run(op_, nullptr);
  return error_of_rows(op_, op_.y);
}
template <>
double Problem<SiluMul>::error(const Kernel<SiluMul>& kernel) const {
  kernel.run(op_, nullptr);
  return error_of_rows(op_, op_.y);
}

}  // namespace bench
