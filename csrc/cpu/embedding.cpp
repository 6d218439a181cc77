// Rows of a quantized table as f32, from canonical weights or from those packed for a linear: a tied head and the embedding share one copy.
#include <algorithm>
#include <cmath>

#include "cpu/threads.h"
#include "dispatch.h"
#include "half.h"

namespace pe {
namespace {

struct TableRow {
  const QLinear& table;
  int64_t r;

  int64_t lanes() const { return table.layout == Layout::canonical ? 1 : int64_t(table.layout); }
  float scale(int64_t g) const {
    const int64_t at = (r / lanes() * (table.k / table.group) + g) * lanes() + r % lanes();
    return table.scale_f32 ? static_cast<const float*>(table.scale)[at] : half_to_float(static_cast<const uint16_t*>(table.scale)[at]);
  }
  int zero(int64_t g) const {
    return table.zero ? table.zero[(r / lanes() * (table.k / table.group) + g) * lanes() + r % lanes()] : 1 << (table.bits - 1);
  }

  // The code of input c (ops.h, Layout).
  int code(int64_t c) const {
    if (table.layout == Layout::canonical) {
      if (table.bits == 8) return table.weight[r * table.k + c];
      return table.weight[r * ((table.k + 1) / 2) + c / 2] >> c % 2 * 4 & 15;
    }
    const int64_t inputs = 32 / table.bits, words = (table.k + 7) / 8 * 8 / inputs;
    const int byte = table.weight[((r / lanes() * words + c / inputs) * lanes() + r % lanes()) * 4 + c % 4];
    return table.bits == 8 ? byte : byte >> c % 8 / 4 * 4 & 15;
  }

  void write(float* y) const {
    for (int64_t g = 0; g < table.k / table.group; ++g) {
      const float s = scale(g);
      const int z = zero(g);
      for (int64_t c = g * table.group; c < (g + 1) * table.group; ++c) y[c] = float(code(c) - z) * s;
    }
    for (int64_t j = 0; j < table.columns; ++j)
      y[table.column_index[j]] = half_to_float(table.column_value[(r / lanes() * table.columns + j) * lanes() + r % lanes()]);
    if (!table.outlier_row) return;
    for (int64_t e = table.outlier_row[r]; e < table.outlier_row[r + 1]; ++e) {
      const int64_t c = table.k > 65536 ? static_cast<const int32_t*>(table.outlier_col)[e] : static_cast<const uint16_t*>(table.outlier_col)[e];
      y[c] = half_to_float(table.outlier_value[e]);
    }
  }
};

void embedding(const Embedding& op, void*) {
  parallel_for(op.m, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      float* y = op.y + i * op.table.k;
      if (op.token[i] >= 0 && op.token[i] < op.table.n)
        TableRow{op.table, op.token[i]}.write(y);
      else
        std::fill(y, y + op.table.k, NAN);
    }
  });
}

const char* refuses(const Embedding& op) { return op.table.layout == Layout::mma ? "reads no weights that are packed for a GPU" : nullptr; }

const Row<Embedding> row{{"embedding_reference", Device::cpu, Arch::any, 0, Layout::canonical, refuses, embedding}};

}  // namespace
}  // namespace pe
