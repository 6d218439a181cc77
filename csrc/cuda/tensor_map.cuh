// Matrices as the copy engine of Hopper sees them.
#pragma once

#include <cuda.h>

#include <string>

#include "cuda/launch.cuh"

namespace pe {

// Boxes of `box_rows` rows of 128 bytes, swizzled as ptx::operand() wants them, of a row-major matrix. type_bytes: of an element.
inline CUtensorMap tensor_map(CUtensorMapDataType type, int type_bytes, const void* base, int64_t columns, int64_t rows, int64_t row_bytes,
                              int box_rows) {
  static const auto encode = [] {  // the driver's, found at run time: the module is not linked with it
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found;
    PE_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &found));
    if (found != cudaDriverEntryPointSuccess) throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled: it is older than 12.0");
    return reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  }();
  const cuuint64_t size[2] = {cuuint64_t(columns), cuuint64_t(rows)}, stride[1] = {cuuint64_t(row_bytes)};
  const cuuint32_t box[2] = {cuuint32_t(128 / type_bytes), cuuint32_t(box_rows)}, step[2] = {1, 1};
  CUtensorMap map;
  const CUresult result = encode(&map, type, 2, const_cast<void*>(base), size, stride, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                                 CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("cuTensorMapEncodeTiled: error " + std::to_string(result));
  return map;
}

}  // namespace pe
