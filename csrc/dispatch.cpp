// The tables of kernels and what this machine's processor offers.
#include "dispatch.h"

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace pe {

template <class Op>
std::vector<Kernel<Op>>& kernels() {
  static std::vector<Kernel<Op>> rows;
  return rows;
}

template <class Op>
Row<Op>::Row(Kernel<Op> kernel) {
  kernels<Op>().push_back(kernel);
}

template std::vector<Kernel<QLinear>>& kernels();
template std::vector<Kernel<Embedding>>& kernels();
template std::vector<Kernel<ScatterAdd>>& kernels();
template std::vector<Kernel<RmsNorm>>& kernels();
template std::vector<Kernel<SiluMul>>& kernels();
template std::vector<Kernel<Transform>>& kernels();
template std::vector<Kernel<RopeKV>>& kernels();
template std::vector<Kernel<Attention>>& kernels();
template std::vector<Kernel<Sample>>& kernels();
template std::vector<Kernel<RoundColumns>>& kernels();
template struct Row<QLinear>;
template struct Row<Embedding>;
template struct Row<ScatterAdd>;
template struct Row<RmsNorm>;
template struct Row<SiluMul>;
template struct Row<Transform>;
template struct Row<RopeKV>;
template struct Row<Attention>;
template struct Row<Sample>;
template struct Row<RoundColumns>;

#if defined(__x86_64__)
namespace {

// AMX takes the processor (CPUID leaf 7: tiles and their products of bf16 and of i8; subleaf 1: vectors of bf16) and the kernel's leave to use its
// 8 KiB of registers, which a process asks for once.
bool amx_works() {
  unsigned a, b, c, d, a1, b1, c1, d1;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !__get_cpuid_count(7, 1, &a1, &b1, &c1, &d1)) return false;
  if (!(d >> 22 & 1) || !(d >> 24 & 1) || !(d >> 25 & 1) || !(a1 >> 5 & 1)) return false;
#if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

}  // namespace
#endif

#if defined(PE_CUDA_BUILT)
const char* missing_gpu(Arch arch);  // cuda/device.cu
#else
static const char* missing_gpu(Arch) { return "built without CUDA"; }
OnGpu::OnGpu(int) {}
OnGpu::~OnGpu() {}
void* gpu_workspace(void*, size_t) { return nullptr; }  // there is no kernel that asks
#endif

const char* missing(Arch arch) {
  if (arch == Arch::sm80 || arch == Arch::sm90a) return missing_gpu(arch);
#if defined(__x86_64__)
  switch (arch) {
    case Arch::any:
      return nullptr;
    case Arch::avx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")
                 ? nullptr
                 : "this CPU has no AVX2 with FMA and F16C";
    case Arch::avx512:
#if defined(PE_EMULATE_AVX512)
      return nullptr;
#endif
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
                     __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni")
                 ? nullptr
                 : "this CPU has no AVX-512 with VNNI";
    case Arch::amx: {
#if defined(PE_EMULATE_AVX512)
      return nullptr;
#endif
      static const bool works = !missing(Arch::avx512) && amx_works();
      return works ? nullptr : "this CPU has no AMX with bf16 and int8, or the kernel does not grant it";
    }
    default:
      break;
  }
#endif
  return arch == Arch::any ? nullptr : "not an x86-64 CPU";
}

}  // namespace pe
