// The C++ API: one plain struct an op. Pointers are the caller's; an op never allocates, prints or exits.
// On the CPU activations are f32 and a stream is null. Strides count elements between rows. m = tokens, n = outputs, k = inputs.
// On a GPU activations are f16 or bf16: `dtype` says what the `float*` of an op's activations then really point at (weights of norms,
// biases and tables stay f32), and so, since no kernel takes both, which device an op is for.
#pragma once

#include <cstddef>
#include <cstdint>

namespace pe {

enum class Dtype : int { f32 = 0, f16 = 1, bf16 = 2 };

// How the codes of a quantized weight lie in memory. Files hold `canonical` alone; pack.cpp makes the others at load.
//   canonical  weight[n, ceil(k*bits/8)] row-major, even column in the low nibble; scale, zero [n, k/group]
//   tileR      R = 8 or 16 rows side by side, one 32-bit word a row: weight[n/R][k/s][R][4] with s = 32/bits inputs a word.
//              4 bits: byte b holds input b (low nibble) and input 4+b (high nibble) of the word's eight. 8 bits: byte b is
//              input b of four. scale, zero [n/R][k/group][R]. n is padded to R with scale 0, k to 8 with code 0.
//   mma        for CUDA: tiles of 64 outputs × 64 inputs, [n/64][k/64] of them, each in the order in which a warp's lanes hold the row
//              operand of a tensor core (m16n8k16): [band of 16 outputs][16 bytes of bits/4 of its steps][lane]. Lane 4g+t has outputs
//              g and g+8 of the band and the 8 inputs from 32h+8t on for each half h of the tile: step s holds those from
//              32(s/2) + 8t + 4(s%2) on, as pairs (g: 0,1) (g+8: 0,1) (g: 2,3) (g+8: 2,3). 4 bits: a step is one word, pair p in nibbles
//              p and p+4. 8 bits: two words, two pairs each. scale, zero [n/64][k/group][g][band][g or g+8]. n is padded to 64 with
//              scale 0, k to 64 with code 0.
enum class Layout : int { canonical = 0, mma = 1, tile8 = 8, tile16 = 16 };

// How outliers lie beside a tiled weight, for kernels that take R outputs or R outliers at a time. Masks chosen by gradients are so
// uneven (some outputs have none, some are full) that rows cut to one length waste more than they hold, and loops over the rows of
// a CSR matrix mispredict at every end. So in each band of 128 outputs
//   every R outliers of an output make a vector of their own (OutlierRun: `vectors` of them, one after another);
//   what an output has left, fewer than R, goes by groups: outputs sorted by that number, R to a group, lane i of each of the group's
//   `steps` vectors for the group's output i. Outputs that run out are filled up with column 0 and value 0.
// A vector is R columns (u16, or i32 if k > 65536), then R values (f16). First the runs' vectors of a band, then its groups'.
struct OutlierBand {
  static constexpr int64_t rows = 128;
  uint32_t first_vector, first_run, runs;
  uint8_t steps[rows / 8];  // of each group; only rows / R are used
  uint8_t row[rows];        // within the band, in the order of the groups; what is beyond n has no outliers
};
struct OutlierRun {
  uint32_t row, vectors;    // row within the band
};

// y[m,n] = x[m,k] · w[n,k]ᵀ (+ bias) (+ residual),  w = scale · (code − zero), outlier values and whole columns in their places.
// gated: y[m,n/2] = silu(g) · u instead, where g and u are the first and the second half of those n columns; no residual.
// act_bits 16: a kernel may use x as f32, as 16-bit fixed point with a scale a group, or (from 16 tokens on) x and w as bf16.
// act_bits 8 or 4: each token is quantized to integer codes (below, Transform, says how), the products with the weight's codes are summed
// exactly in int32 over a group; outliers and columns multiply the unquantized x. A token with NaN or infinity gives NaN. Where Transform has
// made the codes they come as x_code and x_scale, and x is read for outliers and columns alone; else CPU kernels make them themselves, and
// CUDA kernels have Transform make them in the workspace. Those quantize whatever the number of tokens is, and round nothing before
// y = sum · (scale · x_scale) in f32, to which the columns' f32 sum is added: a token gets the same bits in any batch and from any of them.
// With groups of 64 or 128 the sums times scale are added in f32 first, in an order that depends on m. So far they take symmetric weights,
// and columns but no single outliers.
// Bound on ‖y − oracle‖ / ‖oracle‖ for normally distributed x: 1e-5 with f32 or 8-bit codes, 1e-4 with fixed point (an input that
// towers over its group costs the others of the group digits), 5e-3 with bf16.
// For f16 and bf16 the sums are f32. Columns are exact; codes, zeros and outliers are so where weights go from registers into the tensor
// cores, and rounded to dtype where they go through shared memory: ≤ 1e-3 for f16 and ≤ 6e-3 for bf16, each given x and with y rounded to
// dtype, and weights whose scale is no less than 2^-14 (below, f16 itself has fewer digits; to scales in f16 that is no loss).
// The same call gives the same bits always: no float atomics.
// On the CPU sums do not depend on the number of threads, nor on m for one kernel: its result for a token has the same bits in any batch.
struct QLinear {
  int64_t m = 0, n = 0, k = 0;
  Dtype dtype = Dtype::f32;        // of x, y and residual
  int64_t group = 0;               // inputs that share a scale: 32, 64, 128 or k
  int bits = 4;                    // 4 or 8: bits that a code occupies
  int act_bits = 16;               // 16, 8 or 4
  Layout layout = Layout::canonical;
  bool scale_f32 = false;          // scale is f32, else f16
  const float* x = nullptr;
  int64_t x_stride = 0;
  const float* act_clip = nullptr; // nullable f32[2]: the clip of act_bits 8 or 4, where codes are not given
  const void* x_code = nullptr;    // nullable, with x_scale f32[m]: i8[m, k], or for 4 bits u8[m, k/2] as Transform packs them
  const float* x_scale = nullptr;
  float* y = nullptr;
  int64_t y_stride = 0;
  bool gated = false;
  const float* residual = nullptr; // nullable; laid out as y, may be y
  const float* bias = nullptr;     // nullable f32[n]
  const uint8_t* weight = nullptr;
  const void* scale = nullptr;
  const uint8_t* zero = nullptr;   // nullable: then 2^(bits−1)
  // CSR, nullable together; columns are u16, or i32 if k > 65536. The dense code at an outlier is its zero code, so adding is replacing.
  const int32_t* outlier_row = nullptr;    // [n+1]
  const void* outlier_col = nullptr;       // [nnz]
  const uint16_t* outlier_value = nullptr; // f16[nnz]
  // The same outliers as pack_outlier_bands() orders them, nullable together; for kernels of a tile layout.
  const OutlierBand* outlier_band = nullptr;
  const OutlierRun* outlier_run = nullptr;
  const uint8_t* outlier_vector = nullptr;
  // The same outliers for layout mma, nullable together, in tiles of 16 outputs × 64 inputs (16 outputs are what one tensor-core
  // instruction yields): entry = value << 16 | output in the band << 12 | input modulo 4096, by output and input within a tile.
  const uint32_t* outlier_offset = nullptr;  // [n/16 · k/64 + 1], n and k padded to 64: where each tile begins, band by band
  const uint32_t* outlier_entry = nullptr;   // [nnz padded to 4 with zeros], 16-byte aligned
  // Whole inputs kept in f16: input column_index[j] has the weights column_value[:, j]. Nullable together. Their dense codes are zero codes,
  // and no outlier lies in them, so that adding is replacing here too. Beside a tile layout the values lie as the weights' lanes do.
  int64_t columns = 0;
  const int32_t* column_index = nullptr;   // [columns], ascending
  const uint16_t* column_value = nullptr;  // f16[n, columns]; f16[n/R][columns][R] beside tileR, n padded to R with 0
  // workspace_bytes(op) bytes, 64-byte aligned. For CUDA zeroed before its first use, and one a stream; null: gpu_workspace() (dispatch.h).
  void* workspace = nullptr;
};

// y[m, column[j]] += x[m, j] for j < n: what a residual over some outputs of a linear adds. Exact.
struct ScatterAdd {
  int64_t m = 0, n = 0;
  const float* x = nullptr;         // f32[m, n]
  const int32_t* column = nullptr;  // [n], no two the same
  float* y = nullptr;
  int64_t y_stride = 0;
};

// y[m,k] = rows token[m] of a table of `table.n` rows: its weights alone are read, in any layout, and rounded once to dtype. A token that
// the table does not have gives a row of NaN.
struct Embedding {
  int64_t m = 0;
  Dtype dtype = Dtype::f32;        // of y
  QLinear table;
  const int64_t* token = nullptr;
  float* y = nullptr;
};

// token[i] = one of the n tokens of logits[i, :]: the largest, the first of equals; or with temperature[i] > 0 a draw from
// softmax(logits[i, :] / temperature[i]), the same for the same seed[i] and position[i]: the largest of (logit − largest) / temperature −
// ln e, in f32, with e by random.h: word c%4 of philox(counter {c/4, position[i], 0, 0}, key seed[i]) for token c. The kernels of all
// devices choose the same token. It is −1, which Embedding turns into NaN, where a logit is NaN or +infinity, or all are −infinity.
struct Sample {
  int64_t m = 0, n = 0;
  Dtype dtype = Dtype::f32;             // of logits
  const float* logits = nullptr;
  int64_t stride = 0;
  const float* temperature = nullptr;   // nullable f32[m]: then all are greedy, and seed and position may be null
  const int64_t* seed = nullptr;        // [m]
  const int32_t* position = nullptr;    // [m]
  int64_t* token = nullptr;             // [m]
};

// y[m,n] = v / sqrt(mean(v²) + eps) · weight[n] with v = x[row[i], :], or x[i, :] without `row`; after v += residual where there is
// one: the sum, rounded to dtype, replaces the residual.  Bound: 1e-6 relative for f32; f16 and bf16 add the rounding of the sum and of
// y, 2^-11 or 2^-8 of each value at most.
struct RmsNorm {
  int64_t m = 0, n = 0;
  Dtype dtype = Dtype::f32;
  const float* x = nullptr;
  const int64_t* row = nullptr;  // nullable [m]
  float* residual = nullptr;       // nullable [m,n]
  const float* weight = nullptr;   // f32[n]
  float* y = nullptr;
  float eps = 0;
};

// What the linears of a site read: t[m,n] = leftᵀ · mat(v) · right, where mat(v)[a,b] is a token's v row by row, n = a·b. A factor that is
// absent is the identity; with neither this is the plain quantizer. v is x, or what `weight` or `gated` make of it:
//   weight   RMSNorm: v = x / sqrt(mean(x²) + eps) · weight
//   gated    v = silu(x[:, 0:n]) · x[:, n:2n]
// y takes t in dtype. code takes its codes, of `bits` 8 (i8[m,n]) or 4 (two's complement, two a byte, the even one in the low nibble,
// u8[m,n/2]), and scale f32[m] what a code of 1 stands for. Either may be null, not both.
// Codes: Q = 2^(bits−1) − 1, scale = max(clip[0] · max(t, 0), clip[1] · max(−t, 0)) / Q over the token, in f32; code = t · (1/scale) rounded to
// nearest even, at least −Q−1 and at most Q; clip absent is 1, 1. A token with NaN or infinity has codes 0 and a scale of NaN.
// Bound of y: 1e-5 in f32; from 16 tokens on 1e-2, with v, the factors and what is between them in bf16, unless `exact` forbids it. On CUDA
// v and what is between the factors are rounded to dtype, and for bf16 the factors too: 1e-3 for f16, 1e-2 for bf16, with t rounded once
// more for y.
// Codes are exact where they are made of an exact t, and else off by one where t lies next to the middle between two.
struct Transform {
  int64_t m = 0, n = 0, a = 0, b = 0;  // a, b ≤ 256, on CUDA where there is a factor; n is even for 4 bits
  Dtype dtype = Dtype::f32;            // of x and y
  const float* x = nullptr;
  int64_t x_stride = 0;
  bool gated = false;
  const float* weight = nullptr;       // nullable f32[n]; not with gated
  float eps = 0;
  const void* left = nullptr;          // nullable [a,a], row-major; f32 on the CPU, f16 for CUDA
  const void* right = nullptr;         // nullable [b,b]
  bool exact = false;
  float* y = nullptr;                  // nullable; not x
  int64_t y_stride = 0;
  int bits = 8;                        // of code
  const float* clip = nullptr;         // nullable f32[2]: upper and lower ratio, in (0, 1]
  void* code = nullptr;                // nullable; rows follow each other without gaps
  float* scale = nullptr;
};

// What makes the codes of a linear's activations, but for where they go: Transform without factors.
inline Transform quantizer_of(const QLinear& op) {
  Transform quantizer;
  quantizer.m = op.m, quantizer.n = quantizer.b = op.k, quantizer.a = 1, quantizer.dtype = op.dtype;
  quantizer.x = op.x, quantizer.x_stride = op.x_stride, quantizer.bits = op.act_bits, quantizer.clip = op.act_clip;
  return quantizer;
}

// y[m,n] = silu(x[m, 0:n]) · x[m, n:2n]; x holds gate and up side by side.  Bound: 1e-6 relative for f32; f16 and bf16 add the rounding
// of y, 2^-11 or 2^-8.
struct SiluMul {
  int64_t m = 0, n = 0;
  Dtype dtype = Dtype::f32;
  const float* x = nullptr;
  float* y = nullptr;
};

// Rounds a weight's columns one after another, each to the codes of its grid, and has the columns still to come make up for its error: what
// GPTQ, GPFQ and coordinate descent share (pyengine/quant/columns.py).
//   code = clamp(round(value[j] / s) + z, low, high) and q = (code − z) · s, with s and z of group[j]; q = value[j] as f16 where mask[j] is 1;
//   value[c] += coupling[c, j] · (q − base[j]) for all c > j, where base is value if there is none.
// Afterwards value[j] is what it was when its turn came, and code has excess added. Each output goes its own way: arrays hold tiles of 32
// of them, value, base, mask and code [n/32][k][32], scale and zero [n/32][groups][32]; coupling is [⌈k/16⌉][k][16], with j in blocks of 16, so that
// what a block does to the rest is read in one stream. Additions go in the order of j, each an fma, so that all
// kernels give the same bits, however many threads there are. Scales are not 0.
struct RoundColumns {
  static constexpr int64_t tile = 32, block = 16;
  int64_t n = 0, k = 0, groups = 0;   // n is a multiple of the tile
  int low = 0, high = 0, excess = 0;
  const float* scale = nullptr;
  const float* zero = nullptr;        // nullable
  const int32_t* group = nullptr;     // [k]
  const uint8_t* mask = nullptr;      // nullable, 0 or 1
  const float* base = nullptr;        // nullable
  const float* coupling = nullptr;    // only what is left of the diagonal, j < c, is read
  float* value = nullptr;
  uint8_t* code = nullptr;
};

// The keys and values of one layer: f16[slot][head][length][head_dim], true GQA (never repeated heads). With bits 8 they are codes
// i8 in the same places, each worth scale · code, with a scale for each key and for each value of a head: f32[slot][head][length], whose
// strides are those of the codes divided by head_dim. f32, for f16 would run out of digits below max|v| = 0.008 to save 3 % at head_dim 64.
// With bits 4 codes are 0…15, each worth scale · (code − zero), two a byte with the even element in the low nibble, element i in byte i/2;
// zero is a u8 beside each scale. Strides count elements there too.
struct KVCache {
  int bits = 16;                   // 16, 8 or 4
  void* k = nullptr;
  void* v = nullptr;
  float* k_scale = nullptr;        // with bits 8 and 4
  float* v_scale = nullptr;
  uint8_t* k_zero = nullptr;       // with bits 4
  uint8_t* v_zero = nullptr;
  int64_t slot_stride = 0;         // elements from one slot to the next
  int64_t head_stride = 0;         // elements from one head to the next: length · head_dim
};

// Rotates q in place and k on its way to the cache, and writes v beside it, for rows (slot, position). What qkv holds of k afterwards
// is the kernel's own. After the rotation q ← q · q_transform and k ← k · k_transform, head by head, where there are any: a change of
// basis that leaves q·k as it was and makes keys easier to quantize.
// For a cache of 8 bits, scale = max|v| / 127 and codes are rounded to nearest even; where a head holds NaN or infinity its scale is NaN,
// so that it stays visible, and its codes are 0. For 4 bits high = clip[0] · max(v, 0), low = clip[1] · min(v, 0) over the head, in f32;
// scale = (high − low)/15, zero = −low · (1/scale) and code = v · (1/scale) + zero, each rounded to nearest even, code at least 0 and at
// most 15; NaN or infinity as above, with zero 0. k_clip and v_clip are for 4 bits alone: wider codes have the range to spare.
// Bound of q and k: 1e-6 relative in f32; from 16 rows on 1e-2, with what is turned and its basis in bf16, unless `exact` forbids it.
// qkv[m, (heads + 2·kv_heads)·head_dim]; pairs are (i, i + head_dim/2); cos, sin f32[≥ max position + 1, head_dim/2].
struct RopeKV {
  int64_t m = 0, heads = 0, kv_heads = 0, head_dim = 0;
  Dtype dtype = Dtype::f32;        // of qkv
  float* qkv = nullptr;
  int64_t qkv_stride = 0;
  const float* cos = nullptr;
  const float* sin = nullptr;
  const void* q_transform = nullptr;  // nullable [head_dim, head_dim], row-major; f32 on the CPU, f16 for CUDA
  const void* k_transform = nullptr;  // nullable, with q_transform
  bool exact = false;
  const float* k_clip = nullptr;      // nullable f32[2]: upper and lower ratio, in (0, 1]
  const float* v_clip = nullptr;
  const int32_t* slot = nullptr;      // [m]
  const int32_t* position = nullptr;  // [m]
  KVCache cache;
};

// y[m, heads·head_dim] = softmax(q·kᵀ·scale)·v: row i sees positions 0…position[i] of slot[i]. One op for prefill, decode and a mix;
// prefill is quick where neighbouring rows share a slot. head_dim ≤ 256.  Bound: 1e-5 relative; from 16 rows on 1e-2, with bf16, unless
// `exact` forbids it. On CUDA q and weights are f16: 2e-3, and for bf16 the rounding of y, 2^-8 of each value.
struct Attention {
  int64_t m = 0, heads = 0, kv_heads = 0, head_dim = 0;
  Dtype dtype = Dtype::f32;        // of q and y
  const float* q = nullptr;
  int64_t q_stride = 0;
  float* y = nullptr;
  int64_t y_stride = 0;
  float scale = 0;
  bool exact = false;
  const int32_t* slot = nullptr;
  const int32_t* position = nullptr;
  KVCache cache;
  void* workspace = nullptr;       // workspace_bytes(op) bytes, 64-byte aligned; for CUDA as QLinear has it
};

// What a kernel for few rows keeps of a part of the keys for some query heads of one row: the maximum of their scores, and the sum of
// weights and of weighted values relative to it.
constexpr int64_t kFewRows = 16;   // below this a row's keys are shared out in segments
constexpr int64_t kSegment = 256;  // keys
constexpr int64_t kHeadDim = 256;  // the largest head_dim of the vector kernels
constexpr int64_t kTogether = 4;   // query heads: with values and weights they fill AVX2's 16 registers
struct alignas(64) Seen {
  float out[kTogether][kHeadDim];
  float top[kTogether], sum[kTogether];
};

// Tokens that a kernel takes at a time, and one on matrix units: they bound the workspace whatever m is.
constexpr int64_t kChunk = 256;
constexpr int64_t kMatrixChunk = 512;

// Bytes of workspace that any kernel may ask for.
size_t workspace_bytes(const QLinear& op);
size_t workspace_bytes(const Attention& op);

// Bytes of the packed weight, scale and zero of `op` in a tile layout.
struct PackedBytes {
  size_t weight, scale, zero;
};
PackedBytes packed_bytes(const QLinear& op, Layout layout);

// Packs the canonical weight, scale and zero of `op` into `layout`; unpack is the exact inverse. zero may be null in both.
void pack(const QLinear& op, Layout layout, uint8_t* weight, void* scale, uint8_t* zero);
void unpack(const QLinear& op, uint8_t* weight, void* scale, uint8_t* zero);

// Bytes of the bands, runs and vectors of the outliers of `op` beside a tile layout; and their packing.
struct OutlierBytes {
  size_t band, run, vector;
};
OutlierBytes outlier_band_bytes(const QLinear& op, Layout layout);
void pack_outlier_bands(const QLinear& op, Layout layout, OutlierBand* band, OutlierRun* run, uint8_t* vector);

// Values in column_value beside a tile layout, and their packing from canonical ones.
size_t column_count(const QLinear& op, Layout layout);
void pack_columns(const QLinear& op, Layout layout, uint16_t* value);

// Layout mma: numbers of u32 in the lists of outliers, and the lists from the CSR of `op` and back.
struct OutlierCounts {
  size_t offset, entry;
};
OutlierCounts outlier_counts(const QLinear& op);
void pack_outliers(const QLinear& op, uint32_t* offset, uint32_t* entry);
void unpack_outliers(const QLinear& op, int32_t* row, void* col, uint16_t* value);

}  // namespace pe
