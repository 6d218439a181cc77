#include "gpu_problem.h"

#include "operands.h"

namespace bench::gpu {
namespace {

using pe::Dtype, pe::Kernel, pe::QLinear, pe::RmsNorm, pe::RopeKV, pe::SiluMul;

char* put(std::vector<Memory>& owned, const void* from, size_t bytes) {
  owned.emplace_back(bytes);
  if (bytes) owned.back().upload(from, bytes);
  return owned.back().data();
}

template <class T>
const T* put_all(std::vector<Memory>& owned, const T* from, size_t count) {
  return reinterpret_cast<const T*>(put(owned, from, count * sizeof(T)));
}

// Rows of `width` floats as dtype, `stride` values apart on the GPU.
float* put_rows(std::vector<Memory>& owned, const float* from, int64_t rows, int64_t width, int64_t stride, Dtype dtype) {
  std::vector<uint16_t> bits(size_t(rows * stride));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) bits[size_t(r * stride + c)] = to_bits(from[r * width + c], dtype);
  return reinterpret_cast<float*>(put(owned, bits.data(), bits.size() * 2));
}

float* room(std::vector<Memory>& owned, int64_t values) {
  owned.emplace_back(size_t(values) * 2);
  return reinterpret_cast<float*>(owned.back().data());
}

std::vector<float> fetch(const float* from, int64_t count, Dtype dtype, const std::vector<Memory>& owned) {
  std::vector<uint16_t> bits(static_cast<size_t>(count));
  std::vector<float> values(bits.size());
  for (const Memory& memory : owned)
    if (memory.data() == reinterpret_cast<const char*>(from)) memory.download(bits.data(), bits.size() * 2);
  std::transform(bits.begin(), bits.end(), values.begin(), [&](uint16_t b) { return from_bits(b, dtype); });
  return values;
}

template <class Op>
void run_once(const Kernel<Op>& kernel, const Op& op) {
  kernel.run(op, nullptr);
  finish();
}

}  // namespace

// ---- QLinear

template <>
Placed<QLinear> place(const Problem<QLinear>& problem, const Spec& spec, size_t cold) {
  Placed<QLinear> placed;
  auto& owned = placed.owned;
  const QLinear& canonical = problem.op();
  const pe::PackedBytes size = pe::packed_bytes(canonical, pe::Layout::mma);
  const pe::OutlierCounts counts = canonical.outlier_row ? pe::outlier_counts(canonical) : pe::OutlierCounts{};
  std::vector<uint8_t> weight(size.weight), scale(size.scale);
  std::vector<uint32_t> offset(counts.offset), entry(counts.entry);
  pe::pack(canonical, pe::Layout::mma, weight.data(), scale.data(), nullptr);
  if (canonical.outlier_row) pe::pack_outliers(canonical, offset.data(), entry.data());

  QLinear op = asked(problem, spec);
  op.layout = pe::Layout::mma;
  op.outlier_row = nullptr, op.outlier_col = nullptr, op.outlier_value = nullptr;
  op.x = put_rows(owned, canonical.x, op.m, op.k, op.x_stride, op.dtype);
  op.y = room(owned, op.m * op.n), op.y_stride = op.n;
  owned.emplace_back(pe::workspace_bytes(op));
  op.workspace = owned.back().data();

  // One allocation for all copies: what lies side by side cannot share a line of the cache.
  const std::pair<const void*, size_t> parts[] = {
      {weight.data(), weight.size()}, {scale.data(), scale.size()}, {offset.data(), offset.size() * 4}, {entry.data(), entry.size() * 4},
      {op.column_index, size_t(op.columns) * 4}, {op.column_value, size_t(op.n * op.columns) * 2}};
  constexpr size_t kParts = std::size(parts);
  size_t each = 0;
  for (const auto& part : parts) each += (part.second + 255) / 256 * 256;
  const size_t count = std::max<size_t>(1, (cold + each - 1) / each);
  owned.emplace_back(each * count);
  Memory& memory = owned.back();
  size_t at[kParts], end = 0;
  for (size_t i = 0; i < kParts; ++i) {
    at[i] = end, end += (parts[i].second + 255) / 256 * 256;
    if (parts[i].second) memory.upload(parts[i].first, parts[i].second, at[i]);
  }
  memory.fill_from(each);
  for (size_t copy = 0; copy < count; ++copy) {
    char* base = memory.data() + copy * each;
    op.weight = reinterpret_cast<uint8_t*>(base + at[0]), op.scale = base + at[1];
    if (canonical.outlier_row)
      op.outlier_offset = reinterpret_cast<uint32_t*>(base + at[2]), op.outlier_entry = reinterpret_cast<uint32_t*>(base + at[3]);
    op.column_index = reinterpret_cast<int32_t*>(base + at[4]), op.column_value = reinterpret_cast<uint16_t*>(base + at[5]);
    placed.copies.push_back(op);
  }
  return placed;
}

template <>
double error(const Kernel<QLinear>& kernel, const Problem<QLinear>& problem, const Spec&, const Placed<QLinear>& placed) {
  const QLinear& op = placed.copies[0];
  run_once(kernel, op);
  return error_of_tokens(problem.op(), fetch(op.y, op.m * op.n, op.dtype, placed.owned).data(), op.n);
}

// ---- RmsNorm and SiluMul

template <>
Placed<RmsNorm> place(const Problem<RmsNorm>& problem, const Spec& spec, size_t) {
  Placed<RmsNorm> placed;
  RmsNorm op = asked(problem, spec);
  op.weight = put_all(placed.owned, op.weight, size_t(op.n));
  op.x = put_rows(placed.owned, op.x, op.m, op.n, op.n, op.dtype), op.y = room(placed.owned, op.m * op.n);
  placed.copies.push_back(op);
  return placed;
}

template <>
Placed<SiluMul> place(const Problem<SiluMul>& problem, const Spec& spec, size_t) {
  Placed<SiluMul> placed;
  SiluMul op = asked(problem, spec);
  op.x = put_rows(placed.owned, op.x, op.m, 2 * op.n, 2 * op.n, op.dtype), op.y = room(placed.owned, op.m * op.n);
  placed.copies.push_back(op);
  return placed;
}

template <>
double error(const Kernel<RmsNorm>& kernel, const Problem<RmsNorm>& problem, const Spec&, const Placed<RmsNorm>& placed) {
  const RmsNorm& op = placed.copies[0];
  run_once(kernel, op);
  return error_of_rows(problem.op(), fetch(op.y, op.m * op.n, op.dtype, placed.owned).data());
}
template <>
double error(const Kernel<SiluMul>& kernel, const Problem<SiluMul>& problem, const Spec&, const Placed<SiluMul>& placed) {
  const SiluMul& op = placed.copies[0];
  run_once(kernel, op);
  return error_of_rows(problem.op(), fetch(op.y, op.m * op.n, op.dtype, placed.owned).data());
}

// ---- RopeKV

namespace {
int64_t cached(const RopeKV& op) {  // values of k, and of v
  return (*std::max_element(op.slot, op.slot + op.m) + 1) * op.cache.slot_stride;
}
}  // namespace
template <>
Placed<RopeKV> place(const Problem<RopeKV>& problem, const Spec& spec, size_t) {
  Placed<RopeKV> placed;
  auto& owned = placed.owned;
  const RopeKV& canonical = problem.op();
  RopeKV op = asked(problem, spec);
  const size_t angles = size_t(*std::max_element(op.position, op.position + op.m) + 1) * size_t(op.head_dim / 2);
  const size_t bytes = size_t(cached(canonical)) * 2;
  op.qkv = put_rows(owned, op.qkv, op.m, op.qkv_stride, op.qkv_stride, op.dtype);
  op.cos = put_all(owned, op.cos, angles), op.sin = put_all(owned, op.sin, angles);
  op.slot = put_all(owned, op.slot, size_t(op.m)), op.position = put_all(owned, op.position, size_t(op.m));
  op.cache.k = put(owned, canonical.cache.k, bytes), op.cache.v = put(owned, canonical.cache.v, bytes);
  placed.copies.push_back(op);
  return placed;
}
template <>
double error(const Kernel<RopeKV>& kernel, const Problem<RopeKV>& problem, const Spec&, const Placed<RopeKV>& placed) {
  const RopeKV& op = placed.copies[0];
  RopeKV reference = problem.op();
  run_once(kernel, op);
  const int64_t values = cached(reference), row = reference.qkv_stride;
  std::vector<float> qkv(reference.qkv, reference.qkv + op.m * row);
  std::vector<uint16_t> k(static_cast<size_t>(values)), v(k.size());
  std::memcpy(k.data(), reference.cache.k, k.size() * 2), std::memcpy(v.data(), reference.cache.v, v.size() * 2);
  reference.qkv = qkv.data(), reference.cache.k = k.data(), reference.cache.v = v.data();
  oracle<RopeKV>().run(reference, nullptr);
  Norms norms;
  const std::vector<float> turned = fetch(op.qkv, op.m * row, op.dtype, placed.owned);
  for (int64_t i = 0; i < op.m; ++i) compare(norms, &turned[size_t(i * row)], &qkv[size_t(i * row)], op.heads * op.head_dim);
  for (const auto& [mine, theirs] : {std::pair(op.cache.k, &k), std::pair(op.cache.v, &v)}) {
    const std::vector<float> found = fetch(static_cast<const float*>(mine), values, Dtype::f16, placed.owned);
    for (size_t i = 0; i < found.size(); ++i) norms.add(found[i], pe::half_to_float((*theirs)[i]));
  }
  return norms.ratio();
}

}  // namespace bench::gpu
