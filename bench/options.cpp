#include "options.h"

#include <array>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <functional>
#include <map>

#include "cpu/threads.h"

namespace bench {

const char* const kHelp = R"(qbench: how fast each kernel of PyEngine's dispatch table is, against what this machine can do.

  --list             the kernels of every op, and what this machine lacks for them
  --device cpu|cuda  whose kernels are timed (default cpu), and listed if it is given
  --op NAME          qlinear, rmsnorm, silu_mul, transform, rope_kv or attention (default: all)
  --shape M,N,K      tokens, outputs, inputs of a linear; M,N of rmsnorm and silu_mul; M,A,B of transform, whose factors have A and B rows;
                     M,HEADS,KV_HEADS,HEAD_DIM of the others
  --model NAME       the layers of llama-3-8b, llama-2-7b, qwen2.5-7b or smollm2-135m (default: smollm2-135m)
  --tokens M,M,...   with --model: tokens at a time (default 1)
  --kernel NAME      only this one, even the reference (default: all but the reference that take the problem)
  --check            compare with the reference before timing; a kernel that is wrong ends the run with exit code 1
  --check-only       the same, and no timing: a single run of each kernel
  --bits 4|8  --group 32|64|128|0  --act-bits 4|8|16   of the linears (default 4, 128, 16; group 0 is a whole row).
                     A transform makes codes of --act-bits, or numbers with 16. On a GPU linears take codes that are there already
  --outliers SHARE   of their weights in FP16 (default 0.01)
  --mask skewed|uniform   outliers crowd into some rows and columns, as gradients choose them (default), or not
  --columns SHARE    of their inputs in FP16 as whole columns (default 0)
  --basis            rope_kv on the CPU multiplies q and k by a change of basis as well
  --context N        tokens that a decode step of attention looks back on (default 512)
  --dtype f16|bf16   of the activations on a GPU (default f16)
  --cold MIB         weights and KV cache are copied until they take this much and used in turn, so that they come from memory (default 512; on a GPU
                     twice its L2 cache).
                     A virtual machine may report the cache of its whole host; what counts is where the read bandwidth stops falling.
                     0: the same weights again and again, from whatever cache holds them
  --threads N        (default: all cores)
  --json             one JSON object

A line is a median of at least 20 runs. GB/s counts weights, activations and results once, GOP/s a multiply-add as two. `of peak` is the time that
weights and cache would need at the measured bandwidth, or the operations at the measured rate, whichever is longer, over the time it took. fp32
and bf16 are a plain blocked product with dense weights of that type (bench/dense.cpp), cold as well. On a GPU a line is a median of 21 replays of
a CUDA graph of many calls, the peaks are a copy and cuBLAS's products of 8192 x 8192 x 8192, and fp16 is cuBLAS's with dense weights, cold as
well, and its time over the kernel's; - where libcublasLt is not found (LD_LIBRARY_PATH may name its folder). In the place of fp16 a transform
has the same in a launch for each step: norm or SiLU, factors, quantization.
)";

namespace {

constexpr int64_t kMostTokens = 1 << 16, kMostFeatures = 1 << 20, kMostWeights = int64_t(1) << 32, kMostActivations = int64_t(1) << 30;

struct Model {
  int64_t hidden, ffn, heads, kv_heads, head_dim, vocab;
};
const std::map<std::string, Model> kModels = {
    {"llama-3-8b", {4096, 14336, 32, 8, 128, 128256}},
    {"llama-2-7b", {4096, 11008, 32, 32, 128, 32000}},
    {"qwen2.5-7b", {3584, 18944, 28, 4, 128, 152064}},
    {"smollm2-135m", {576, 1536, 9, 3, 64, 49152}},
};

template <class T>
T number(const std::string& option, const std::string& text) {
  T value{};
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) throw WrongUsage(option + " is '" + text + "', expected a number");
  return value;
}

std::string one_of(const std::string& option, const std::string& text, const std::array<std::string, 2>& known) {
  if (text != known[0] && text != known[1]) throw WrongUsage(option + " is '" + text + "', expected " + known[0] + " or " + known[1]);
  return text;
}

std::vector<int64_t> numbers(const std::string& option, const std::string& text) {
  std::vector<int64_t> all;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find(',', begin), text.size());
    all.push_back(number<int64_t>(option, text.substr(begin, end - begin)));
    begin = end + 1;
  }
  return all;
}

void require(bool good, const std::string& what) {
  if (!good) throw std::runtime_error(what);
}

void require_range(const std::string& name, int64_t value, int64_t least, int64_t most) {
  require(value >= least && value <= most,
          name + " is " + std::to_string(value) + ", expected " + std::to_string(least) + " to " + std::to_string(most));
}

void check(const Options& o) {
  const Spec& s = o.spec;
  require(s.bits == 4 || s.bits == 8, "--bits is " + std::to_string(s.bits) + ", expected 4 or 8");
  require(s.act_bits == 4 || s.act_bits == 8 || s.act_bits == 16, "--act-bits is " + std::to_string(s.act_bits) + ", expected 4, 8 or 16");
  require(s.group == 0 || s.group == 32 || s.group == 64 || s.group == 128,
          "--group is " + std::to_string(s.group) + ", expected 32, 64, 128 or 0");
  require(s.outliers >= 0 && s.outliers <= 0.5, "--outliers is " + std::to_string(s.outliers) + ", expected 0 to 0.5");
  require(s.columns >= 0 && s.columns <= 0.5, "--columns is " + std::to_string(s.columns) + ", expected 0 to 0.5");
  require_range("--context", s.context, 1, kMostFeatures);
  require_range("--cold", int64_t(o.cold_bytes >> 20), 0, 1 << 16);
  if (o.threads) require_range("--threads", o.threads, 1, pe::kMostThreads);
  for (int64_t m : o.tokens) require_range("M of --tokens", m, 1, kMostTokens);
  if (!o.model.empty() && !kModels.count(o.model)) {
    std::string known;
    for (const auto& [name, model] : kModels) known += " " + name;
    throw std::runtime_error("--model is '" + o.model + "', known are" + known);
  }
  require(o.model.empty() || o.shape.empty(), "--model and --shape cannot both be given");
  require(!s.basis || o.device != "cuda", "--basis is for the CPU's rope_kv");
}

// The largest group with kernels that is no larger than the one asked for and divides k, as pyengine.qtensor.fit_group.
int64_t fit_group(int64_t group, int64_t k) {
  if (group == 0 || group >= k) return k;
  for (int64_t g : {128, 64, 32})
    if (g <= group && k % g == 0) return g;
  return k;
}

Spec linear(Spec s, const std::string& label, int64_t n, int64_t k) {
  s.label = label, s.n = n, s.k = k, s.group = fit_group(s.group, k);
  return s;
}

Spec factors(Spec s, const std::string& label, int64_t a, int64_t b) {
  s.label = label, s.n = a * b, s.a = a, s.b = b;
  return s;
}

// n inputs by the two factors that are closest to each other, as FlatQuant has them.
Spec site(const Spec& s, const std::string& label, int64_t n, bool norm) {
  int64_t a = 1;
  for (int64_t i = 1; i * i <= n; ++i)
    if (n % i == 0) a = i;
  Spec out = factors(s, label, a, n / a);
  out.norm = norm;
  return out;
}

std::vector<Spec> layers(const std::string& op, const Model& c, Spec s) {
  s.heads = c.heads, s.kv_heads = c.kv_heads, s.head_dim = c.head_dim;
  if (op == "qlinear") {
    const int64_t q = c.heads * c.head_dim, kv = c.kv_heads * c.head_dim;
    Spec head = s;  // PyEngine's checkpoints hold the output matrix so
    head.bits = 8, head.group = 64, head.outliers = 0, head.columns = 0;
    std::vector<Spec> all = {linear(s, "qkv", q + 2 * kv, c.hidden), linear(s, "o", c.hidden, q), linear(s, "gate_up", 2 * c.ffn, c.hidden),
                             linear(s, "down", c.hidden, c.ffn)};
    if (s.act_bits == 16) all.push_back(linear(head, "head", c.vocab, c.hidden));  // whose activations are never quantized
    return all;
  }
  if (op == "transform") {
    Spec o = factors(s, "o_in", c.heads, c.head_dim);
    o.left_alone = true;
    Spec down = site(s, "down_in", c.ffn, false);
    down.gated = s.dtype != pe::Dtype::f32;  // the CPU's linears gate by themselves
    return {site(s, "attn_in", c.hidden, true), o, site(s, "mlp_in", c.hidden, true), down};
  }
  s.label = op;
  s.n = op == "silu_mul" ? c.ffn : c.hidden;
  return {s};
}

Spec shaped(const std::string& op, const std::vector<int64_t>& shape, Spec s) {
  const size_t wanted = op == "qlinear" || op == "transform" ? 3 : op == "rmsnorm" || op == "silu_mul" ? 2 : 4;
  require(shape.size() == wanted, "--shape has " + std::to_string(shape.size()) + " numbers, " + op + " takes " + std::to_string(wanted));
  require_range("M of --shape", shape[0], 1, kMostTokens);
  for (size_t i = 1; i < shape.size(); ++i) require_range("a number of --shape", shape[i], 1, kMostFeatures);
  s.label = "shape", s.m = shape[0], s.n = shape[1];
  if (op == "transform") {
    for (size_t i : {1, 2}) require_range(i == 1 ? "A of --shape" : "B of --shape", shape[i], 1, 256);
    require(s.act_bits != 4 || shape[1] * shape[2] % 2 == 0, "codes of 4 bits go in pairs, but A times B is odd");
    return factors(s, "shape", shape[1], shape[2]);
  }
  if (wanted == 3) {
    s.k = shape[2];
    require(s.k > 1, "K of --shape is 1, expected at least 2");
    if (s.group == 0 || s.group > s.k) s.group = s.k;
    require(s.k % s.group == 0, "--group is " + std::to_string(s.group) + ", which does not divide K = " + std::to_string(s.k));
  }
  if (wanted == 4) {
    s.heads = shape[1], s.kv_heads = shape[2], s.head_dim = shape[3];
    require(s.heads % s.kv_heads == 0, std::to_string(s.heads) + " heads cannot share " + std::to_string(s.kv_heads) + " key heads");
    require(s.head_dim % 2 == 0, "HEAD_DIM of --shape is " + std::to_string(s.head_dim) + ", expected an even number");
  }
  return s;
}

}  // namespace

std::vector<Spec> specs(const std::string& name, const Options& o) {
  std::vector<Spec> all;
  if (!o.shape.empty()) {
    all.push_back(shaped(name, o.shape, o.spec));
  } else {
    for (int64_t m : o.tokens) {
      Spec s = o.spec;
      s.m = m;
      for (const Spec& layer : layers(name, kModels.at(o.model.empty() ? "smollm2-135m" : o.model), s)) all.push_back(layer);
    }
  }
  for (const Spec& s : all) {
    const int64_t width = s.k ? s.n + s.k : s.n + s.heads * s.head_dim, cached = s.kv_heads * s.head_dim * std::max(s.context, s.m);
    require(s.n * std::max<int64_t>(s.k, 1) <= kMostWeights && width <= kMostActivations / s.m &&
                cached <= kMostActivations / std::min<int64_t>(s.m, 16),
            s.label + ": the problem is too large for this benchmark");
  }
  return all;
}

Options parse(int argc, char** argv) {
  Options o;
  const std::map<std::string, std::function<void()>> flags = {{"--list", [&] { o.list = true; }},
                                                              {"--check", [&] { o.check = true; }},
                                                              {"--check-only", [&] { o.check = o.check_only = true; }},
                                                              {"--json", [&] { o.json = true; }},
                                                              {"--basis", [&] { o.spec.basis = true; }},
                                                              {"--help", [&] { o.help = true; }}};
  using Text = const std::string&;
  const std::map<std::string, std::function<void(Text, Text)>> values = {
      {"--op", [&](Text, Text v) { o.op = v; }},
      {"--kernel", [&](Text, Text v) { o.kernel = v; }},
      {"--model", [&](Text, Text v) { o.model = v; }},
      {"--shape", [&](Text name, Text v) { o.shape = numbers(name, v); }},
      {"--tokens", [&](Text name, Text v) { o.tokens = numbers(name, v); }},
      {"--threads", [&](Text name, Text v) { require_range(name, o.threads = number<int>(name, v), 1, pe::kMostThreads); }},
      {"--bits", [&](Text name, Text v) { o.spec.bits = number<int>(name, v); }},
      {"--act-bits", [&](Text name, Text v) { o.spec.act_bits = number<int>(name, v); }},
      {"--group", [&](Text name, Text v) { o.spec.group = number<int64_t>(name, v); }},
      {"--outliers", [&](Text name, Text v) { o.spec.outliers = number<double>(name, v); }},
      {"--columns", [&](Text name, Text v) { o.spec.columns = number<double>(name, v); }},
      {"--context", [&](Text name, Text v) { o.spec.context = number<int64_t>(name, v); }},
      {"--cold", [&](Text name, Text v) { o.cold_given = true, o.cold_bytes = size_t(number<uint32_t>(name, v)) << 20; }},
      {"--device", [&](Text name, Text v) { o.device = one_of(name, v, {"cpu", "cuda"}); }},
      {"--dtype", [&](Text name, Text v) { o.dtype = one_of(name, v, {"f16", "bf16"}) == "f16" ? pe::Dtype::f16 : pe::Dtype::bf16; }},
      {"--mask", [&](Text name, Text v) { o.spec.skewed = one_of(name, v, {"skewed", "uniform"}) == "skewed"; }},
  };
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (const auto flag = flags.find(name); flag != flags.end()) {
      flag->second();
    } else if (const auto value = values.find(name); value != values.end()) {
      if (++i == argc) throw WrongUsage(name + " needs a value");
      value->second(name, argv[i]);
    } else {
      throw WrongUsage("unknown option '" + name + "' (--help lists them)");
    }
  }
  check(o);
  if (o.device == "cuda") o.spec.dtype = o.dtype;
  return o;
}

}  // namespace bench
