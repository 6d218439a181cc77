// The tables of kernels and what this machine's processor offers.
#include "dispatch.h"

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
template std::vector<Kernel<RmsNorm>>& kernels();
template std::vector<Kernel<SiluMul>>& kernels();
template std::vector<Kernel<RopeKV>>& kernels();
template std::vector<Kernel<Attention>>& kernels();
template struct Row<QLinear>;
template struct Row<RmsNorm>;
template struct Row<SiluMul>;
template struct Row<RopeKV>;
template struct Row<Attention>;

#if defined(PE_CUDA_BUILT)
const char* missing_gpu(Arch arch);  // cuda/device.cu
#else
static const char* missing_gpu(Arch) { return "built without CUDA"; }
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
    default:
      break;
  }
#endif
  return arch == Arch::any ? nullptr : "not an x86-64 CPU";
}

}  // namespace pe
