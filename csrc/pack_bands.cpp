// CSR outliers → bands of vectors (ops.h, OutlierBand).
#include <algorithm>
#include <cstring>
#include <numeric>

#include "ops.h"

namespace pe {
namespace {

struct Packing {
  const QLinear& op;
  int64_t lanes;

  int64_t index_bytes() const { return op.k > 65536 ? 4 : 2; }
  int64_t vector_bytes() const { return lanes * (index_bytes() + 2); }
  int64_t bands() const { return (op.n + OutlierBand::rows - 1) / OutlierBand::rows; }
  int64_t count(int64_t band, int64_t r) const {
    const int64_t row = band * OutlierBand::rows + r;
    return row < op.n ? op.outlier_row[row + 1] - op.outlier_row[row] : 0;
  }
  int64_t left(int64_t band, int64_t r) const { return count(band, r) % lanes; }

  // Outputs by what they have left, most first; of equal ones the first.
  void sort(int64_t band, uint8_t (&row)[OutlierBand::rows]) const {
    std::iota(row, row + OutlierBand::rows, uint8_t(0));
    std::stable_sort(row, row + OutlierBand::rows, [&](uint8_t a, uint8_t b) { return left(band, a) > left(band, b); });
  }

  // Outlier `at` of the layer becomes lane `lane` of a vector.
  void put(uint8_t* vector, int64_t lane, int64_t at) const {
    std::memcpy(vector + lane * index_bytes(), static_cast<const uint8_t*>(op.outlier_col) + at * index_bytes(), size_t(index_bytes()));
    std::memcpy(vector + lanes * index_bytes() + lane * 2, op.outlier_value + at, 2);
  }
};

}  // namespace

OutlierBytes outlier_band_bytes(const QLinear& op, Layout layout) {
  const Packing p{op, int64_t(layout)};
  OutlierBytes bytes{size_t(p.bands()) * sizeof(OutlierBand), 0, 0};
  for (int64_t b = 0; b < p.bands(); ++b) {
    uint8_t row[OutlierBand::rows];
    p.sort(b, row);
    for (int64_t r = 0; r < OutlierBand::rows; ++r) {
      const int64_t whole = p.count(b, r) / p.lanes;
      bytes.run += whole ? sizeof(OutlierRun) : 0;
      bytes.vector += size_t(whole * p.vector_bytes());
      if (r % p.lanes == 0) bytes.vector += size_t(p.left(b, row[r]) * p.vector_bytes());
    }
  }
  return bytes;
}

void pack_outlier_bands(const QLinear& op, Layout layout, OutlierBand* band, OutlierRun* run, uint8_t* vector) {
  const Packing p{op, int64_t(layout)};
  std::memset(vector, 0, outlier_band_bytes(op, layout).vector);
  uint32_t vectors = 0, runs = 0;
  for (int64_t b = 0; b < p.bands(); ++b, ++band) {
    *band = {vectors, runs, 0, {}, {}};
    p.sort(b, band->row);
    const int32_t* start = op.outlier_row + b * OutlierBand::rows;
    for (int64_t r = 0; r < OutlierBand::rows; ++r) {
      const int64_t whole = p.count(b, r) / p.lanes;
      if (!whole) continue;
      run[runs++] = {uint32_t(r), uint32_t(whole)}, ++band->runs;
      for (int64_t e = 0; e < whole * p.lanes; ++e) p.put(vector + (vectors + e / p.lanes) * p.vector_bytes(), e % p.lanes, start[r] + e);
      vectors += uint32_t(whole);
    }
    for (int64_t g = 0; g < OutlierBand::rows / p.lanes; ++g) {
      const int64_t steps = p.left(b, band->row[g * p.lanes]);
      band->steps[g] = uint8_t(steps);
      for (int64_t lane = 0; lane < p.lanes; ++lane) {
        const int64_t r = band->row[g * p.lanes + lane], left = p.left(b, r);
        for (int64_t s = 0; s < left; ++s) p.put(vector + (vectors + s) * p.vector_bytes(), lane, start[r + 1] - left + s);
      }
      vectors += uint32_t(steps);
    }
  }
}

}  // namespace pe
