#include "cublas.h"

#include <dlfcn.h>

#include <initializer_list>
#include <stdexcept>

#include "gpu.h"

namespace bench {
namespace {

// The numbers and the struct of cublasLt.h that are used here; they have been the same since CUDA 11.
constexpr int kReal16 = 2, kReal32 = 0, kInt8 = 3, kInt32 = 10;                 // cudaDataType_t
constexpr int kCompute32F = 68, kCompute32I = 72;                              // cublasComputeType_t
constexpr int kTransposeA = 3, kTranspose = 1, kMostWorkspace = 1;             // attributes of a product, cublasOperation_t, of a preference
constexpr size_t kWorkspace = size_t(64) << 20;

struct Heuristic {
  uint64_t algorithm[8];
  size_t workspace;
  int status;
  float waves;
  int reserved[4];
};
static_assert(sizeof(Heuristic) == 96);

void check(int status, const char* call) {
  if (status) throw std::runtime_error(std::string(call) + ": cuBLAS status " + std::to_string(status));
}

}  // namespace

struct Cublas::Functions {
  int (*create)(void**);
  int (*destroy)(void*);
  size_t (*version)();
  int (*product_create)(void**, int compute, int scale);
  int (*product_destroy)(void*);
  int (*product_set)(void*, int attribute, const void*, size_t);
  int (*layout_create)(void**, int type, uint64_t rows, uint64_t columns, int64_t leading);
  int (*layout_destroy)(void*);
  int (*preference_create)(void**);
  int (*preference_destroy)(void*);
  int (*preference_set)(void*, int attribute, const void*, size_t);
  int (*heuristic)(void* handle, void* product, void* a, void* b, void* c, void* d, void* preference, int wanted, Heuristic*, int* found);
  int (*multiply)(void* handle, void* product, const void* alpha, const void* a, void* a_layout, const void* b, void* b_layout, const void* beta,
                  const void* c, void* c_layout, void* d, void* d_layout, const void* algorithm, void* workspace, size_t, void* stream);
};

std::unique_ptr<Cublas> Cublas::load() {
  void* library = nullptr;
  for (const char* name : {"libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"})
    if (!library) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) return nullptr;
  auto f = std::make_unique<Functions>();
  bool all = true;
  auto get = [&]<class F>(F& function, const char* name) { all &= (function = reinterpret_cast<F>(dlsym(library, name))) != nullptr; };
  get(f->create, "cublasLtCreate"), get(f->destroy, "cublasLtDestroy"), get(f->version, "cublasLtGetVersion");
  get(f->product_create, "cublasLtMatmulDescCreate"), get(f->product_destroy, "cublasLtMatmulDescDestroy");
  get(f->product_set, "cublasLtMatmulDescSetAttribute"), get(f->layout_create, "cublasLtMatrixLayoutCreate");
  get(f->layout_destroy, "cublasLtMatrixLayoutDestroy"), get(f->preference_create, "cublasLtMatmulPreferenceCreate");
  get(f->preference_destroy, "cublasLtMatmulPreferenceDestroy"), get(f->preference_set, "cublasLtMatmulPreferenceSetAttribute");
  get(f->heuristic, "cublasLtMatmulAlgoGetHeuristic"), get(f->multiply, "cublasLtMatmul");
  if (!all) throw std::runtime_error("libcublasLt lacks a function that qbench uses");
  return std::unique_ptr<Cublas>(new Cublas(std::move(f)));
}

Cublas::Cublas(std::unique_ptr<Functions> functions) : functions_(std::move(functions)) { check(functions_->create(&handle_), "cublasLtCreate"); }
Cublas::~Cublas() { functions_->destroy(handle_); }

std::string Cublas::version() const {
  const size_t v = functions_->version();  // 130100 is 13.1.0
  return "cuBLAS " + std::to_string(v / 10000) + "." + std::to_string(v / 100 % 100) + "." + std::to_string(v % 100);
}

struct Cublas::Product::State {
  const Cublas& cublas;
  bool int8;
  void *product = nullptr, *w = nullptr, *x = nullptr, *y = nullptr, *preference = nullptr;
  Heuristic best = {};
  gpu::Memory workspace{kWorkspace};

  ~State() {
    const Functions& f = *cublas.functions_;
    if (product) f.product_destroy(product);
    for (void* layout : {w, x, y})
      if (layout) f.layout_destroy(layout);
    if (preference) f.preference_destroy(preference);
  }
};

// cuBLAS counts by columns: our rows of k are its columns, so it multiplies w (transposed) and x to yᵀ.
Cublas::Product::Product(const Cublas& cublas, bool int8, int64_t m, int64_t n, int64_t k) : state_(new State{cublas, int8}) {
  const Functions& f = *cublas.functions_;
  State& s = *state_;
  const int in = int8 ? kInt8 : kReal16, out = int8 ? kInt32 : kReal16;
  check(f.product_create(&s.product, int8 ? kCompute32I : kCompute32F, int8 ? kInt32 : kReal32), "cublasLtMatmulDescCreate");
  check(f.product_set(s.product, kTransposeA, &kTranspose, sizeof kTranspose), "cublasLtMatmulDescSetAttribute");
  check(f.layout_create(&s.w, in, uint64_t(k), uint64_t(n), k), "cublasLtMatrixLayoutCreate");
  check(f.layout_create(&s.x, in, uint64_t(k), uint64_t(m), k), "cublasLtMatrixLayoutCreate");
  check(f.layout_create(&s.y, out, uint64_t(n), uint64_t(m), n), "cublasLtMatrixLayoutCreate");
  check(f.preference_create(&s.preference), "cublasLtMatmulPreferenceCreate");
  check(f.preference_set(s.preference, kMostWorkspace, &kWorkspace, sizeof kWorkspace), "cublasLtMatmulPreferenceSetAttribute");
  int found = 0;
  check(f.heuristic(cublas.handle_, s.product, s.w, s.x, s.y, s.y, s.preference, 1, &s.best, &found), "cublasLtMatmulAlgoGetHeuristic");
  if (!found || s.best.status) throw std::runtime_error("cuBLAS has no algorithm for this product");
}
Cublas::Product::~Product() = default;

void Cublas::Product::run(const void* x, const void* w, void* y, void* stream) const {
  const State& s = *state_;
  const float one = 1, none = 0;
  const int32_t whole_one = 1, whole_none = 0;
  const void *alpha = s.int8 ? static_cast<const void*>(&whole_one) : &one, *beta = s.int8 ? static_cast<const void*>(&whole_none) : &none;
  check(s.cublas.functions_->multiply(s.cublas.handle_, s.product, alpha, w, s.w, x, s.x, beta, y, s.y, y, s.y, s.best.algorithm,
                                      s.workspace.data(), kWorkspace, stream),
        "cublasLtMatmul");
}

}  // namespace bench
