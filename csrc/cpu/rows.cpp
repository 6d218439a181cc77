// Compiled once for each instruction set: PE_ISA names the struct of cpu/isa/<isa>.h that the kernels are instantiated with.
// Nothing here may use a non-trivial inline function of the standard library: the linker keeps one copy of it for every machine.
#include "cpu/attention.h"
#include "cpu/elementwise.h"
#include "cpu/qlinear.h"
#include "cpu/rope_kv.h"
#include "cpu/round_columns.h"
#include "cpu/transform.h"
#include PE_ISA_HEADER

namespace pe {
namespace {

using V = PE_ISA;
// AVX2 runs wherever AVX-512 does: the wider one ranks above it.
constexpr int rank = V::lanes == 16 ? 3 : 1;
constexpr auto cpu = Device::cpu;
constexpr auto plain = Layout::canonical;

const Row<QLinear> qlinear_row{{"qlinear_" PE_ISA_NAME, cpu, V::arch, rank, V::layout, qlinear_refuses<V>, qlinear<V>}};
const Row<RmsNorm> rmsnorm_row{{"rmsnorm_" PE_ISA_NAME, cpu, V::arch, rank, plain, rmsnorm_refuses, rmsnorm<V>}};
const Row<SiluMul> silu_mul_row{{"silu_mul_" PE_ISA_NAME, cpu, V::arch, rank, plain, nullptr, silu_mul<V>}};
const Row<Transform> transform_row{{"transform_" PE_ISA_NAME, cpu, V::arch, rank, plain, transform_refuses, transform<V>}};
const Row<RopeKV> rope_kv_row{{"rope_kv_" PE_ISA_NAME, cpu, V::arch, rank, plain, rope_kv_refuses, rope_kv<V>}};
const Row<RoundColumns> round_columns_row{{"round_columns_" PE_ISA_NAME, cpu, V::arch, rank, plain, nullptr, round_columns<V>}};
const Row<Attention> attention_row{{"attention_" PE_ISA_NAME, cpu, V::arch, rank, plain, attention_refuses, attention<V>}};

}  // namespace
}  // namespace pe
