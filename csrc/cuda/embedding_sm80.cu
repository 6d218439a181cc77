// Rows of a quantized table of layout mma as f16 or bf16, so that an embedding and the head tied to it share one copy. A thread takes eight
// inputs of a row: of the table's tiles of 64 × 64 they lie side by side, among those of the output 8 further, in one lane's place.
#include "cuda/launch.cuh"
#include "cuda/layout_mma.cuh"
#include "cuda/ptx.cuh"
#include "dispatch.h"

namespace pe {
namespace {

constexpr int kThreads = 128;

// Where row r of the table lies: in which tile of outputs, where in it; and how many tiles of inputs there are.
struct Place {
  int64_t tile;
  int band, high, g, tiles;
  __device__ Place(const QLinear& table, int64_t r)
      : tile(r / mma::kTile), band(r % mma::kTile / mma::kBand), high(r % mma::kBand / 8), g(r % 8), tiles(int((table.k + 63) / mma::kTile)) {}
};

// The codes of inputs c … c+7. Of a step, four inputs, pair p lies in nibbles p and p+4 of its word, or for 8 bits in bytes 2p and 2p+1.
__device__ __forceinline__ void load_codes(const QLinear& table, const Place& place, int c, int (&code)[8]) {
  const int half = c % mma::kTile / 32, lane = place.g * 4 + c % 32 / 8;
  const size_t band = (size_t(place.tile) * place.tiles + c / mma::kTile) * 4 + place.band;
  if (table.bits == 4) {
    const uint2 two = *reinterpret_cast<const uint2*>(table.weight + (band * 32 + lane) * 16 + half * 8);
    for (int j = 0; j < 8; ++j) code[j] = (j < 4 ? two.x : two.y) >> (j % 4 / 2 * 2 + place.high + j % 2 * 4) * 4 & 15;
  } else {
    const uint4 four = *reinterpret_cast<const uint4*>(table.weight + ((band * 2 + half) * 32 + lane) * 16);
    const uint32_t word[4] = {four.x, four.y, four.z, four.w};
    for (int j = 0; j < 8; ++j) code[j] = word[j / 2] >> (place.high * 2 + j % 2) * 8 & 255;
  }
}

// Writes the outliers of inputs c … c+7 over v.
__device__ __forceinline__ void place_outliers(const QLinear& table, const Place& place, int c, float (&v)[8]) {
  const size_t tile = size_t(place.tile * 4 + place.band) * place.tiles + c / mma::kTile;
  for (uint32_t i = table.outlier_offset[tile]; i < table.outlier_offset[tile + 1]; ++i) {
    const uint32_t entry = table.outlier_entry[i], input = entry % mma::kSpan;
    if ((entry >> 12 & 15) != place.high * 8 + place.g || input / 8 != c % mma::kSpan / 8) continue;
    for (int j = 0; j < 8; ++j) v[j] = input % 8 == j ? __half2float(__ushort_as_half(uint16_t(entry >> 16))) : v[j];
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
embedding_kernel(const __grid_constant__ Embedding op) {
  ptx::dependency_release();
  ptx::dependency_wait();
  const QLinear& table = op.table;
  const int c = (blockIdx.y * kThreads + threadIdx.x) * 8, k = int(table.k);
  if (c >= k) return;
  const int64_t r = op.token[blockIdx.x];
  float v[8];
  if (r < 0 || r >= table.n) {
    for (int j = 0; j < 8; ++j) v[j] = NAN;
  } else {
    const Place place(table, r);
    const size_t at = (place.tile * (k / int(table.group)) + c / int(table.group)) * mma::kTile + place.g * 8 + place.band * 2 + place.high;
    const float scale = table.scale_f32 ? static_cast<const float*>(table.scale)[at] : __half2float(static_cast<const __half*>(table.scale)[at]);
    const int zero = table.zero ? table.zero[at] : 1 << (table.bits - 1);
    int code[8];
    load_codes(table, place, c, code);
    for (int j = 0; j < 8; ++j) v[j] = float(code[j] - zero) * scale;
    if (table.outlier_entry) place_outliers(table, place, c, v);
  }
  T* y = reinterpret_cast<T*>(op.y) + size_t(blockIdx.x) * k + c;
  if (k % 8 == 0)
    store8(y, v);
  else
    for (int j = 0; j < 8; ++j)
      if (c + j < k) y[j] = T(v[j]);
}

const char* refuses(const Embedding& op) {
  const QLinear& t = op.table;
  if (t.layout != Layout::mma) return "reads a table of layout mma";
  if (t.bits != 4 && t.bits != 8) return "takes codes of 4 or 8 bits";
  if (t.group % 8 && t.group != t.k) return "takes groups of a multiple of 8, or a whole row";
  if (t.columns) return "takes outliers, no whole columns";
  return aligned16(op.y) ? nullptr : "y is not 16-byte aligned";
}

void run(const Embedding& op, void* stream) {
  if (op.m == 0) return;
  with_type(op.dtype, [&]<class T>(const T*) {
    launch(embedding_kernel<T>, dim3(unsigned(op.m), unsigned(mma::blocks_of(op.table.k, kThreads * 8))), dim3(kThreads), 0, stream, op);
  });
}

const Row<Embedding> row{{"embedding_sm80", Device::cuda, Arch::sm80, 1, Layout::mma, refuses, run}};

}  // namespace
}  // namespace pe
