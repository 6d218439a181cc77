// The module _C: op structs with their pointers as integers, and the dispatch table. It knows neither torch nor kernels;
// pyengine/ops.py checks shapes and dtypes before it fills a struct.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <pthread.h>

#include <mutex>
#include <new>

#include "cpu/threads.h"
#include "dispatch.h"
#include "pages.h"

namespace py = pybind11;
using namespace pe;

namespace {

// Ops of several Python threads run one after another: they share workspaces and the thread pool. Taken without the GIL held.
// A child forked while another thread ran one would wait for it forever.
std::mutex running;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { new (&running) std::mutex; });

// A pointer member as a Python integer.
template <class Class, class Struct, class T>
void pointer(Class& c, const char* name, T* Struct::* member) {
  c.def_property(
      name, [member](const Struct& s) { return reinterpret_cast<uintptr_t>(s.*member); },
      [member](Struct& s, uintptr_t p) { s.*member = reinterpret_cast<T*>(p); });
}

py::class_<Program> bind_program(py::module_& m) {
  py::class_<Program> c(m, "Program");
  c.def(py::init<>());
  c.def(
      "run",
      [](const Program& p, uintptr_t stream) {
        py::gil_scoped_release release;
        std::lock_guard turn(running);
        p.run(reinterpret_cast<void*>(stream));
      },
      py::arg("stream") = 0);
  c.def(
      "time",
      [](const Program& p) {
        std::lock_guard turn(running);
        return p.time();
      },
      py::call_guard<py::gil_scoped_release>());
  return c;
}

// The dtype of an op's activations as a Python integer.
template <class Class, class Struct>
void dtype(Class& c, Dtype Struct::* member) {
  c.def_property("dtype", [member](const Struct& s) { return int(s.*member); }, [member](Struct& s, int v) { s.*member = Dtype(v); });
}

// The class of an op and the functions over its table. `device` is the GPU that is meant, −1 the current one.
template <class Op>
py::class_<Op> bind(py::module_& m, py::class_<Program>& program, const char* name) {
  program.def("add", [](Program& p, const Op& op, const std::string& kernel) { p.add(op, kernel); }, py::arg("op"), py::arg("kernel") = "");
  py::class_<Op> c(m, name);
  c.def(py::init<>()).def(py::init<const Op&>());
  c.def(
      "run",
      [](Op op, uintptr_t stream, const std::string& kernel, int device) {  // a copy: the caller may change its own meanwhile
        py::gil_scoped_release release;
        std::lock_guard turn(running);
        const OnGpu gpu(device);
        run(op, reinterpret_cast<void*>(stream), kernel);
      },
      py::arg("stream") = 0, py::arg("kernel") = "", py::arg("device") = -1);
  c.def(
      "choose",
      [](const Op& op, const std::string& kernel, int device) {
        const OnGpu gpu(device);
        return choose(op, kernel).name;
      },
      py::arg("kernel") = "", py::arg("device") = -1);
  c.def_static("kernels", [](int device) {
    const OnGpu gpu(device);
    py::list rows;
    for (const auto& k : kernels<Op>()) {
      const char* why = missing(k.arch);
      rows.append(py::dict(py::arg("name") = k.name, py::arg("device") = k.device == Device::cpu ? "cpu" : "cuda", py::arg("rank") = k.rank,
                           py::arg("layout") = int(k.layout), py::arg("missing") = why ? py::object(py::str(why)) : py::none()));
    }
    return rows;
  }, py::arg("device") = -1);
  return c;
}

void bind_qlinear(py::module_& m, py::class_<Program>& program) {
  auto c = bind<QLinear>(m, program, "QLinear");
  c.def_readwrite("m", &QLinear::m).def_readwrite("n", &QLinear::n).def_readwrite("k", &QLinear::k).def_readwrite("group", &QLinear::group);
  c.def_readwrite("bits", &QLinear::bits).def_readwrite("act_bits", &QLinear::act_bits).def_readwrite("scale_f32", &QLinear::scale_f32);
  c.def_readwrite("gated", &QLinear::gated);
  c.def_readwrite("x_stride", &QLinear::x_stride).def_readwrite("y_stride", &QLinear::y_stride);
  c.def_property("layout", [](const QLinear& q) { return int(q.layout); }, [](QLinear& q, int v) { q.layout = Layout(v); });
  pointer(c, "x", &QLinear::x), pointer(c, "y", &QLinear::y), pointer(c, "residual", &QLinear::residual), pointer(c, "bias", &QLinear::bias);
  pointer(c, "weight", &QLinear::weight), pointer(c, "scale", &QLinear::scale), pointer(c, "zero", &QLinear::zero);
  pointer(c, "outlier_row", &QLinear::outlier_row), pointer(c, "outlier_col", &QLinear::outlier_col);
  pointer(c, "outlier_value", &QLinear::outlier_value), pointer(c, "workspace", &QLinear::workspace);
  pointer(c, "act_clip", &QLinear::act_clip), pointer(c, "x_code", &QLinear::x_code), pointer(c, "x_scale", &QLinear::x_scale);
  pointer(c, "outlier_band", &QLinear::outlier_band), pointer(c, "outlier_run", &QLinear::outlier_run);
  pointer(c, "outlier_vector", &QLinear::outlier_vector);
  c.def("outlier_band_bytes", [](const QLinear& q, int layout) {
    const OutlierBytes b = outlier_band_bytes(q, Layout(layout));
    return py::make_tuple(b.band, b.run, b.vector);
  });
  c.def("pack_outlier_bands", [](const QLinear& q, int layout, uintptr_t band, uintptr_t run, uintptr_t vector) {
    py::gil_scoped_release release;
    pack_outlier_bands(q, Layout(layout), reinterpret_cast<OutlierBand*>(band), reinterpret_cast<OutlierRun*>(run), reinterpret_cast<uint8_t*>(vector));
  });
  pointer(c, "outlier_offset", &QLinear::outlier_offset), pointer(c, "outlier_entry", &QLinear::outlier_entry), dtype(c, &QLinear::dtype);
  c.def_readwrite("columns", &QLinear::columns), pointer(c, "column_index", &QLinear::column_index);
  pointer(c, "column_value", &QLinear::column_value);
  c.def("column_count", [](const QLinear& q, int layout) { return column_count(q, Layout(layout)); });
  c.def("pack_columns", [](const QLinear& q, int layout, uintptr_t value) {
    pack_columns(q, Layout(layout), reinterpret_cast<uint16_t*>(value));
  });
  c.def("workspace_bytes", [](const QLinear& q) { return workspace_bytes(q); });
  c.def(
      "target_layout",
      [](const QLinear& q, const std::string& kernel, int device) {
        const OnGpu gpu(device);
        return int(choose(q, kernel).layout);
      },
      py::arg("kernel") = "", py::arg("device") = -1);
  c.def("packed_bytes", [](const QLinear& q, int layout) {
    const PackedBytes b = packed_bytes(q, Layout(layout));
    return py::make_tuple(b.weight, b.scale, b.zero);
  });
  c.def("pack", [](const QLinear& q, int layout, uintptr_t weight, uintptr_t scale, uintptr_t zero) {
    py::gil_scoped_release release;
    pack(q, Layout(layout), reinterpret_cast<uint8_t*>(weight), reinterpret_cast<void*>(scale), reinterpret_cast<uint8_t*>(zero));
  });
  c.def("unpack", [](const QLinear& q, uintptr_t weight, uintptr_t scale, uintptr_t zero) {
    py::gil_scoped_release release;
    unpack(q, reinterpret_cast<uint8_t*>(weight), reinterpret_cast<void*>(scale), reinterpret_cast<uint8_t*>(zero));
  });
  c.def("outlier_counts", [](const QLinear& q) {
    const OutlierCounts counts = outlier_counts(q);
    return py::make_tuple(counts.offset, counts.entry);
  });
  c.def("pack_outliers", [](const QLinear& q, uintptr_t offset, uintptr_t entry) {
    py::gil_scoped_release release;
    pack_outliers(q, reinterpret_cast<uint32_t*>(offset), reinterpret_cast<uint32_t*>(entry));
  });
  c.def("unpack_outliers", [](const QLinear& q, uintptr_t row, uintptr_t col, uintptr_t value) {
    py::gil_scoped_release release;
    unpack_outliers(q, reinterpret_cast<int32_t*>(row), reinterpret_cast<void*>(col), reinterpret_cast<uint16_t*>(value));
  });
}

void bind_elementwise(py::module_& m, py::class_<Program>& program) {
  auto embedding = bind<Embedding>(m, program, "Embedding");
  embedding.def_readwrite("m", &Embedding::m).def_readwrite("table", &Embedding::table);
  pointer(embedding, "token", &Embedding::token), pointer(embedding, "y", &Embedding::y), dtype(embedding, &Embedding::dtype);
  auto scatter = bind<ScatterAdd>(m, program, "ScatterAdd");
  scatter.def_readwrite("m", &ScatterAdd::m).def_readwrite("n", &ScatterAdd::n).def_readwrite("y_stride", &ScatterAdd::y_stride);
  pointer(scatter, "x", &ScatterAdd::x), pointer(scatter, "column", &ScatterAdd::column), pointer(scatter, "y", &ScatterAdd::y);
  auto sample = bind<Sample>(m, program, "Sample");
  sample.def_readwrite("m", &Sample::m).def_readwrite("n", &Sample::n).def_readwrite("stride", &Sample::stride);
  pointer(sample, "logits", &Sample::logits), pointer(sample, "temperature", &Sample::temperature), pointer(sample, "seed", &Sample::seed);
  pointer(sample, "position", &Sample::position), pointer(sample, "token", &Sample::token), dtype(sample, &Sample::dtype);
  auto norm = bind<RmsNorm>(m, program, "RmsNorm");
  norm.def_readwrite("m", &RmsNorm::m).def_readwrite("n", &RmsNorm::n).def_readwrite("eps", &RmsNorm::eps);
  pointer(norm, "x", &RmsNorm::x), pointer(norm, "weight", &RmsNorm::weight), pointer(norm, "y", &RmsNorm::y);
  pointer(norm, "row", &RmsNorm::row);
  pointer(norm, "residual", &RmsNorm::residual), dtype(norm, &RmsNorm::dtype);
  auto silu = bind<SiluMul>(m, program, "SiluMul");
  silu.def_readwrite("m", &SiluMul::m).def_readwrite("n", &SiluMul::n);
  pointer(silu, "x", &SiluMul::x), pointer(silu, "y", &SiluMul::y), dtype(silu, &SiluMul::dtype);
}

void bind_round_columns(py::module_& m, py::class_<Program>& program) {
  auto c = bind<RoundColumns>(m, program, "RoundColumns");
  c.def_readonly_static("tile", &RoundColumns::tile).def_readonly_static("block", &RoundColumns::block);
  c.def_readwrite("n", &RoundColumns::n).def_readwrite("k", &RoundColumns::k).def_readwrite("groups", &RoundColumns::groups);
  c.def_readwrite("low", &RoundColumns::low).def_readwrite("high", &RoundColumns::high).def_readwrite("excess", &RoundColumns::excess);
  pointer(c, "scale", &RoundColumns::scale), pointer(c, "zero", &RoundColumns::zero), pointer(c, "group", &RoundColumns::group);
  pointer(c, "mask", &RoundColumns::mask), pointer(c, "base", &RoundColumns::base), pointer(c, "coupling", &RoundColumns::coupling);
  pointer(c, "value", &RoundColumns::value), pointer(c, "code", &RoundColumns::code);
}

void bind_transform(py::module_& m, py::class_<Program>& program) {
  auto c = bind<Transform>(m, program, "Transform");
  c.def_readwrite("m", &Transform::m).def_readwrite("n", &Transform::n).def_readwrite("a", &Transform::a).def_readwrite("b", &Transform::b);
  c.def_readwrite("x_stride", &Transform::x_stride).def_readwrite("y_stride", &Transform::y_stride).def_readwrite("gated", &Transform::gated);
  c.def_readwrite("eps", &Transform::eps).def_readwrite("bits", &Transform::bits).def_readwrite("exact", &Transform::exact);
  pointer(c, "x", &Transform::x), pointer(c, "weight", &Transform::weight), pointer(c, "left", &Transform::left);
  pointer(c, "right", &Transform::right), pointer(c, "y", &Transform::y), pointer(c, "clip", &Transform::clip);
  pointer(c, "code", &Transform::code), pointer(c, "scale", &Transform::scale), dtype(c, &Transform::dtype);
}

void bind_attention(py::module_& m, py::class_<Program>& program) {
  py::class_<KVCache> cache(m, "KVCache");
  cache.def(py::init<>()).def_readwrite("slot_stride", &KVCache::slot_stride).def_readwrite("head_stride", &KVCache::head_stride);
  cache.def_readwrite("bits", &KVCache::bits);
  pointer(cache, "k", &KVCache::k), pointer(cache, "v", &KVCache::v);
  pointer(cache, "k_scale", &KVCache::k_scale), pointer(cache, "v_scale", &KVCache::v_scale);
  pointer(cache, "k_zero", &KVCache::k_zero), pointer(cache, "v_zero", &KVCache::v_zero);
  auto rope = bind<RopeKV>(m, program, "RopeKV");
  rope.def_readwrite("m", &RopeKV::m).def_readwrite("heads", &RopeKV::heads).def_readwrite("kv_heads", &RopeKV::kv_heads);
  rope.def_readwrite("head_dim", &RopeKV::head_dim).def_readwrite("qkv_stride", &RopeKV::qkv_stride).def_readwrite("cache", &RopeKV::cache);
  rope.def_readwrite("exact", &RopeKV::exact), dtype(rope, &RopeKV::dtype);
  pointer(rope, "qkv", &RopeKV::qkv), pointer(rope, "cos", &RopeKV::cos), pointer(rope, "sin", &RopeKV::sin);
  pointer(rope, "q_transform", &RopeKV::q_transform), pointer(rope, "k_transform", &RopeKV::k_transform);
  pointer(rope, "k_clip", &RopeKV::k_clip), pointer(rope, "v_clip", &RopeKV::v_clip);
  pointer(rope, "slot", &RopeKV::slot), pointer(rope, "position", &RopeKV::position);
  auto attention = bind<Attention>(m, program, "Attention");
  attention.def_readwrite("m", &Attention::m).def_readwrite("heads", &Attention::heads).def_readwrite("kv_heads", &Attention::kv_heads);
  attention.def_readwrite("head_dim", &Attention::head_dim).def_readwrite("q_stride", &Attention::q_stride);
  attention.def_readwrite("y_stride", &Attention::y_stride).def_readwrite("scale", &Attention::scale).def_readwrite("exact", &Attention::exact).def_readwrite("cache", &Attention::cache);
  pointer(attention, "q", &Attention::q), pointer(attention, "y", &Attention::y), dtype(attention, &Attention::dtype);
  pointer(attention, "slot", &Attention::slot), pointer(attention, "position", &Attention::position);
  pointer(attention, "workspace", &Attention::workspace);
  attention.def("workspace_bytes", [](const Attention& a) { return workspace_bytes(a); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  auto program = bind_program(m);
  bind_qlinear(m, program);
  bind_elementwise(m, program);
  bind_round_columns(m, program);
  bind_transform(m, program);
  bind_attention(m, program);
  m.def("advise_large_pages", [](uintptr_t p, size_t bytes) { advise_large_pages(reinterpret_cast<void*>(p), bytes); });
  m.def("gpu_workspace", [](uintptr_t stream, size_t bytes, int device) {
    py::gil_scoped_release release;
    std::lock_guard turn(running);
    const OnGpu gpu(device);
    return reinterpret_cast<uintptr_t>(gpu_workspace(reinterpret_cast<void*>(stream), bytes));
  }, py::arg("stream"), py::arg("bytes"), py::arg("device") = -1);
  m.def("threads", &threads);
  m.def("set_threads", &set_threads);
}
