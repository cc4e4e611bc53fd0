// The Python module fdd_kernels._C: both operations on tensors that fdd_kernels/backends/cpu/ has
// checked and cut.
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>
#include <utility>

#include "memory.h"
#include "problem.h"

namespace {

// Found in the file before it is loaded (fdd_kernels/backends/cpu/extension.py): with another
// torch, loading may crash. Raise the number of the interface, there too, with every change of what
// the functions of this module take or return.
constexpr char kBuiltFor[] = "fdd_kernels built for torch " TORCH_VERSION "; interface 11;";

// (hidden states, weight, bias, logit scale, soft cap or 0)
using ModelArguments = std::tuple<std::vector<at::Tensor>, std::optional<at::Tensor>,
                                  std::optional<at::Tensor>, double, double>;
// (student layer, teacher layer, temperature, name of the divergence, its expectation_of or "", its
// parameters, teacher_mix)
using RequestArguments =
    std::tuple<int64_t, int64_t, double, std::string, std::string, std::vector<double>, double>;
// (first, second, temperature, weighted), as PairMoments of lens/spec.py
using PairArguments = std::tuple<std::optional<fdd::Layers>, fdd::Layers, double, bool>;

std::vector<std::string> divergences() {
  std::vector<std::string> names;
  for (const auto& [name, _] : fdd::kDivergences) names.push_back(name);
  return names;
}

fdd::Request request(const RequestArguments& arguments) {
  const auto& [student_layer, teacher_layer, temperature, name, expectation, parameters,
               teacher_mix] = arguments;
  const auto found = std::find_if(std::begin(fdd::kDivergences), std::end(fdd::kDivergences),
                                  [&](const auto& known) { return name == known.first; });
  TORCH_CHECK_VALUE(found != std::end(fdd::kDivergences), "the C++ kernels know no divergence '",
                    name, "'");
  const std::map<std::string, fdd::Expectation> expectations = {
      {"", fdd::Expectation::kNone},
      {"teacher", fdd::Expectation::kTeacher},
      {"student", fdd::Expectation::kStudent}};
  return {{student_layer, teacher_layer},
          float(1 / temperature),
          found->second,
          expectations.at(expectation),
          fdd::divergence_constants(found->second, parameters),
          float(teacher_mix)};
}

// -inf at tokens with a bias of -inf, which moments leave out; empty if none has one. A soft cap
// makes such a logit finite.
std::vector<float> excluded_columns(const fdd::Problem& p) {
  std::vector<float> excluded;
  for (const fdd::Model* model : {&p.student, &p.teacher})
    for (int64_t c = 0; model->softcap == 0.f && !model->bias.empty() && c < p.columns; ++c) {
      if (model->bias[c] != -std::numeric_limits<float>::infinity()) continue;
      excluded.resize(fdd::round_up(p.columns, fdd::kPadding) + fdd::kPadding);
      excluded[c] = model->bias[c];
    }
  return excluded;
}

fdd::Model model(const ModelArguments& arguments, int64_t columns) {
  const auto& [hidden, weight, bias, scale, softcap] = arguments;
  fdd::Model model;
  for (const at::Tensor& layer : hidden) model.hidden.emplace_back(layer);
  if (weight) model.weight = fdd::Matrix(*weight);
  if (bias) {
    model.bias.resize(fdd::round_up(columns, fdd::kPadding));
    const at::Tensor floats = bias->to(at::kFloat).contiguous();
    std::copy_n(floats.const_data_ptr<float>(), columns, model.bias.begin());
  }
  // A bf16 operand B takes an even depth, and neither operand may be float32.
  model.bf16 = fdd::bf16_gemm() && model.weight.defined() && model.weight.is_bfloat16() &&
               model.width() % 2 == 0 &&
               std::all_of(model.hidden.begin(), model.hidden.end(),
                           [](const fdd::Matrix& h) { return h.is_bfloat16(); });
  model.scale = float(scale);
  model.softcap = float(softcap);
  return model;
}

std::vector<int64_t> integers(const at::Tensor& tensor) {
  const at::Tensor longs = tensor.to(at::kLong).contiguous();
  const int64_t* data = longs.const_data_ptr<int64_t>();
  return {data, data + longs.numel()};
}

// Refuses layers that the hidden states lack. NLL looks at the student's alone.
void check_layers(const fdd::Problem& p) {
  const auto check = [&](const fdd::Layers& layers, bool of_teacher) {
    TORCH_CHECK_INDEX(layers[fdd::kStudent] < p.layers(fdd::kStudent) &&
                          (!of_teacher || layers[fdd::kTeacher] < p.layers(fdd::kTeacher)),
                      "student layer ", layers[fdd::kStudent], " and teacher layer ",
                      layers[fdd::kTeacher], " of ", p.layers(fdd::kStudent), " and ",
                      p.layers(fdd::kTeacher), " hidden states");
  };
  for (const fdd::Request& request : p.requests)
    check(request.layers, request.divergence != fdd::Divergence::kNll);
  for (const fdd::PairMoments& pair : p.moments) {
    check(pair.second, true);
    if (pair.first) check(*pair.first, true);
  }
}

fdd::Problem problem(const ModelArguments& student, const ModelArguments& teacher,
                     bool needs_teacher, int64_t columns, const at::Tensor& rows,
                     const std::optional<at::Tensor>& labels,
                     const std::vector<RequestArguments>& requests,
                     const std::vector<PairArguments>& moments,
                     const std::array<int64_t, 3>& tiles, bool whole, bool teacher_in_place,
                     const std::array<bool, 2>& in_gradient) {
  fdd::Problem p;
  p.student = model(student, columns);
  p.teacher = model(teacher, columns);
  p.needs_teacher = needs_teacher;
  p.columns = columns;
  p.rows = integers(rows);
  if (labels) {
    const std::vector<int64_t> all = integers(*labels);
    for (int64_t row : p.rows) p.labels.push_back(all[row]);
  }
  for (const RequestArguments& arguments : requests) p.requests.push_back(request(arguments));
  for (const auto& [first, second, temperature, weighted] : moments)
    p.moments.push_back({first, second, float(1 / temperature), weighted});
  p.tiles = {tiles[0], tiles[1], tiles[2], whole};
  p.in_gradient = in_gradient;
  p.teacher_in_place = teacher_in_place;
  TORCH_CHECK(!teacher_in_place ||
                  (needs_teacher && !p.teacher.weight.defined() && !p.teacher.transforms() &&
                   columns % fdd::kPadding == 0 &&
                   std::all_of(p.teacher.hidden.begin(), p.teacher.hidden.end(),
                               [](const fdd::Matrix& h) { return h.direct(0, false); })),
              "the teacher's hidden states cannot be read in place");
  p.excluded = excluded_columns(p);
  check_layers(p);
  return p;
}

// Ctrl-C between panels. Runs without the GIL and takes it only to look.
void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

fdd::Statistics statistics(const at::Tensor& shifts, const at::Tensor& requests,
                           const at::Tensor& moments) {
  return {shifts.data_ptr<float>(), requests.data_ptr<float>(), moments.data_ptr<float>(),
          shifts.size(1), shifts.size(2)};
}

fdd::Upstream upstream(const at::Tensor& requests, const at::Tensor& moments) {
  return {requests.const_data_ptr<float>(), moments.const_data_ptr<float>()};
}

fdd::Gradients gradients(const std::optional<at::Tensor>& hidden,
                         const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias,
                         const std::optional<at::Tensor>& weight_low, bool first_call,
                         bool last_call) {
  fdd::Gradients out;
  if (hidden) out.hidden = hidden->data_ptr<float>();
  if (weight) out.weight = *weight;
  if (weight_low) out.weight_low = *weight_low;
  out.first_call = first_call;
  out.last_call = last_call;
  if (bias) out.bias = bias->data_ptr<float>();
  return out;
}

// `gradient` is the head's, needed where logits lie in it.
fdd::CachedLogits cached_logits(const fdd::Problem& p, const at::Tensor& memory,
                                const std::optional<at::Tensor>& gradient) {
  TORCH_CHECK(memory.is_contiguous() && memory.numel() >= fdd::CachedLogits::size(p),
              "memory too small for the logits");
  const bool lent = p.in_gradient[fdd::kStudent] || p.in_gradient[fdd::kTeacher];
  fdd::CachedLogits cached(p, memory.data_ptr<float>(),
                           lent ? gradient.value().data_ptr<float>() : nullptr);
  TORCH_CHECK(!lent || (gradient->is_contiguous() && gradient->size(0) >= p.columns &&
                        gradient->size(1) == p.student.width() && cached.fits_gradient()),
              "a gradient too small for the logits");
  return cached;
}

void stats(const fdd::Problem& p, const at::Tensor& shifts, const at::Tensor& requests,
           const at::Tensor& moments) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  fdd::compute_statistics(p, statistics(shifts, requests, moments), check_signals);
}

void grad(const fdd::Problem& p, const at::Tensor& shifts, const at::Tensor& requests,
          const at::Tensor& moments, const at::Tensor& grad_requests,
          const at::Tensor& grad_moments, const std::optional<at::Tensor>& grad_hidden,
          const std::optional<at::Tensor>& grad_weight,
          const std::optional<at::Tensor>& grad_bias,
          const std::optional<at::Tensor>& weight_low, bool first_call, bool last_call) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  fdd::compute_gradients(p, statistics(shifts, requests, moments),
                         upstream(grad_requests, grad_moments),
                         gradients(grad_hidden, grad_weight, grad_bias, weight_low, first_call,
                                   last_call),
                         check_signals);
}

void stats_and_cache(const fdd::Problem& p, const at::Tensor& memory,
                     const std::optional<at::Tensor>& grad_weight, const at::Tensor& shifts,
                     const at::Tensor& requests, const at::Tensor& moments) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  fdd::CachedLogits cached = cached_logits(p, memory, grad_weight);
  cached.compute();
  fdd::statistics_of(cached, statistics(shifts, requests, moments));
}

// Returns the hidden states' gradients of the problem's rows (L, r, D) if `hidden`: valid until
// `memory` is written again.
std::optional<at::Tensor> grad_of_cached(
    const fdd::Problem& p, const at::Tensor& memory, const at::Tensor& shifts,
    const at::Tensor& requests, const at::Tensor& moments, const at::Tensor& grad_requests,
    const at::Tensor& grad_moments, bool hidden, const std::optional<at::Tensor>& grad_weight,
    const std::optional<at::Tensor>& grad_bias, const std::optional<at::Tensor>& weight_low,
    bool first_call, bool last_call) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  const fdd::CachedLogits cached = cached_logits(p, memory, grad_weight);
  std::optional<at::Tensor> sums;
  if (hidden) sums = cached.hidden_gradients(memory);
  cached.gradients(statistics(shifts, requests, moments), upstream(grad_requests, grad_moments),
                   gradients(sums, grad_weight, grad_bias, weight_low, first_call, last_call));
  return sums;
}

// out (m, n) = a (m, k) b, for benchmarks: a GEMM library alone on every thread. a and b are both
// float32, b (k, n), or both bf16 with an even k, b (k / 2, n, 2) as an operand B; out is float32.
// `tile` has rows, columns and depth: tiles of the output are computed in parallel, each as a sum
// over pieces of that depth. `brgemm` or ATen's mm multiplies them.
void multiply(const at::Tensor& a, const at::Tensor& b, const at::Tensor& out,
              const std::array<int64_t, 3>& tile, bool brgemm) {
  const bool bf16 = a.scalar_type() == at::kBFloat16;
  const int64_t together = bf16 ? 2 : 1, m = a.size(0), k = a.size(1), n = b.size(1);
  const auto [rows, columns, depth] = tile;
  TORCH_CHECK_VALUE(b.scalar_type() == a.scalar_type() && out.scalar_type() == at::kFloat &&
                        (bf16 || a.scalar_type() == at::kFloat),
                    "multiply: a and b must be both float32 or both bfloat16, out float32, not ",
                    a.scalar_type(), ", ", b.scalar_type(), " and ", out.scalar_type());
  TORCH_CHECK_VALUE(b.numel() == k * n && b.size(0) * together == k && out.size(0) == m &&
                        out.size(1) == n && a.is_contiguous() && b.is_contiguous() &&
                        out.is_contiguous(),
                    "multiply: a must be (m, k), b (k, n), in bfloat16 (k / 2, n, 2), and out "
                    "(m, n), all contiguous, not ",
                    a.sizes(), ", ", b.sizes(), " and ", out.sizes());
  TORCH_CHECK_VALUE(rows > 0 && columns > 0 && depth > 0 && depth % together == 0,
                    "multiply: tile must be three positive sizes, in bfloat16 with an even depth");
  TORCH_CHECK_VALUE(!brgemm || fdd::has_brgemm(bf16), "multiply: no brgemm on this processor");
  py::gil_scoped_release release;
  const fdd::Operand operand_a{a.const_data_ptr(), k, bf16}, operand_b{b.const_data_ptr(), n, bf16};
  float* c = out.data_ptr<float>();
  const int64_t down = (m + rows - 1) / rows, across = (n + columns - 1) / columns;
  at::parallel_for(0, down * across, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t row = i % down * rows, column = i / down * columns;
      for (int64_t first = 0; first < k; first += depth)
        fdd::gemm_by(brgemm, std::min(rows, m - row), std::min(columns, n - column),
                     std::min(depth, k - first), operand_a.from(row * k + first),
                     operand_b.from(first * n + together * column), c + row * n + column, n,
                     first > 0);
    }
    fdd::release_gemm();
  });
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<fdd::Problem>(m, "Problem").def(py::init(&problem));
  m.attr("built_for") = kBuiltFor;
  m.def("stats", &stats);
  m.def("grad", &grad);
  m.def("logits_memory", [](const fdd::Problem& p) {
    return fdd::reused_memory({fdd::CachedLogits::size(p)}, at::kFloat, fdd::Use::kLogits);
  });
  m.def("gradient_memory", [](const at::Tensor& like) {
    return fdd::reused_memory(like.sizes(), like.scalar_type(), fdd::Use::kGradient);
  });
  m.def("stats_and_cache", &stats_and_cache);
  m.def("grad_of_cached", &grad_of_cached);
  m.def("divergences", &divergences);
  m.def("instruction_set", [] { return std::string(fdd::row_kernels().name); });
  m.def("has_brgemm", &fdd::has_brgemm);
  m.def("gemm_library", [] { return std::string(fdd::gemm_library()); });
  m.def("bf16_gemm", &fdd::bf16_gemm);
  m.def("multiply", &multiply);
}
