// The Python module fdd_kernels._C: both operations on tensors that fdd_kernels/backends/cpu.py has checked and cut.
#include <ATen/core/grad_mode.h>
#include <torch/extension.h>
#include <torch/version.h>

#include <algorithm>
#include <limits>
#include <map>
#include <string>

#include "lens.h"

namespace {

// Read from the file before it is loaded (fdd_kernels/backends/cpu/extension.py): with another torch, loading may crash.
constexpr char kBuiltFor[] = "fdd_kernels built for torch " TORCH_VERSION ";";

using fdd::Divergence;

// (hidden states, weight, bias, logit scale, soft cap or 0)
using SideArguments = std::tuple<std::vector<at::Tensor>, std::optional<at::Tensor>, std::optional<at::Tensor>, double, double>;
// (layer, temperature, name of the divergence)
using ReadArguments = std::tuple<int64_t, double, std::string>;

const std::map<std::string, Divergence> kDivergences = {
    {"", Divergence::kNone},   {"kl", Divergence::kKl},          {"reverse_kl", Divergence::kReverseKl},
    {"jsd", Divergence::kJsd}, {"skew_kl", Divergence::kSkewKl}, {"nll", Divergence::kNll}};

Divergence divergence(const std::string& name) {
  const auto found = kDivergences.find(name);
  TORCH_CHECK_VALUE(found != kDivergences.end(), "the C++ kernels know no divergence '", name, "'");
  return found->second;
}

std::vector<std::string> divergences() {
  std::vector<std::string> names;
  for (const auto& [name, _] : kDivergences) names.push_back(name);
  return names;
}

// -inf where a bias is, which leaves a column out of the moments; empty if none is. A soft cap makes such a value finite.
std::vector<float> excluded_columns(const fdd::Problem& p) {
  std::vector<float> excluded;
  for (const fdd::Side* side : {&p.student, &p.teacher})
    for (int64_t c = 0; side->softcap == 0.f && !side->bias.empty() && c < p.columns; ++c) {
      if (side->bias[c] != -std::numeric_limits<float>::infinity()) continue;
      excluded.resize(fdd::round_up(p.columns, fdd::kPadding) + fdd::kPadding);
      excluded[c] = side->bias[c];
    }
  return excluded;
}

fdd::Side side(const SideArguments& arguments, int64_t columns) {
  const auto& [hidden, weight, bias, scale, softcap] = arguments;
  fdd::Side side;
  for (const at::Tensor& layer : hidden) side.hidden.emplace_back(layer);
  if (weight) side.weight = fdd::Matrix(*weight);
  if (bias) {
    side.bias.resize(fdd::round_up(columns, fdd::kPadding));
    const at::Tensor values = bias->to(at::kFloat).contiguous();
    std::copy_n(values.const_data_ptr<float>(), columns, side.bias.begin());
  }
  // Pairs of columns, and neither a float32 head nor float32 states beside bfloat16.
  side.narrow = fdd::narrow_products() && side.weight.defined() && side.weight.is_bfloat16() && side.width() % 2 == 0 &&
                std::all_of(side.hidden.begin(), side.hidden.end(), [](const fdd::Matrix& h) { return h.is_bfloat16(); });
  side.scale = float(scale);
  side.softcap = float(softcap);
  return side;
}

std::vector<int64_t> integers(const at::Tensor& tensor) {
  const at::Tensor values = tensor.to(at::kLong).contiguous();
  return {values.const_data_ptr<int64_t>(), values.const_data_ptr<int64_t>() + values.numel()};
}

fdd::Problem problem(const SideArguments& student, const SideArguments& teacher, bool needs_teacher, int64_t columns,
                     const at::Tensor& rows, const std::optional<at::Tensor>& labels,
                     const std::vector<ReadArguments>& reads, const std::vector<std::pair<int64_t, int64_t>>& moments,
                     double moment_temperature, const std::array<int64_t, 3>& tiles) {
  fdd::Problem p;
  p.student = side(student, columns);
  p.teacher = side(teacher, columns);
  p.needs_teacher = needs_teacher;
  p.layers = int64_t(p.student.hidden.size());
  p.columns = columns;
  p.rows = integers(rows);
  if (labels) {
    const std::vector<int64_t> all = integers(*labels);
    for (int64_t row : p.rows) p.labels.push_back(all[row]);
  }
  for (const auto& [layer, temperature, name] : reads) p.reads.push_back({layer, float(1 / temperature), divergence(name)});
  for (const auto& [first, second] : moments) p.moments.push_back({first, second});
  p.moment_inv_temperature = float(1 / moment_temperature);
  p.tiles = {tiles[0], tiles[1], tiles[2]};
  p.excluded = excluded_columns(p);
  return p;
}

// Ctrl-C between panels. Runs without the GIL and takes it only to look.
void check_signals() {
  py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

fdd::Statistics statistics(const at::Tensor& pivots, const at::Tensor& reads, const at::Tensor& moments) {
  return {pivots.data_ptr<float>(), reads.data_ptr<float>(), moments.data_ptr<float>(), pivots.size(2)};
}

void stats(const fdd::Problem& p, const at::Tensor& pivots, const at::Tensor& reads, const at::Tensor& moments) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  fdd::compute_statistics(p, statistics(pivots, reads, moments), check_signals);
}

fdd::Gradients gradients(const std::optional<at::Tensor>& hidden, const std::optional<at::Tensor>& weight,
                         const std::optional<at::Tensor>& bias) {
  fdd::Gradients out;
  if (hidden) out.hidden = hidden->data_ptr<float>();
  if (weight) out.weight = *weight;
  if (bias) out.bias = bias->data_ptr<float>();
  return out;
}

void grad(const fdd::Problem& p, const at::Tensor& pivots, const at::Tensor& reads, const at::Tensor& moments,
          const at::Tensor& grad_reads, const at::Tensor& grad_moments, const std::optional<at::Tensor>& grad_hidden,
          const std::optional<at::Tensor>& grad_weight, const std::optional<at::Tensor>& grad_bias) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  const fdd::Upstream upstream{grad_reads.const_data_ptr<float>(), grad_moments.const_data_ptr<float>()};
  fdd::compute_gradients(p, statistics(pivots, reads, moments), upstream, gradients(grad_hidden, grad_weight, grad_bias),
                         check_signals);
}

fdd::KeptValues kept_values(const fdd::Problem& p, const at::Tensor& memory) {
  TORCH_CHECK(memory.is_contiguous() && memory.numel() >= fdd::KeptValues::size(p), "memory too small for the values");
  return {p, memory.data_ptr<float>()};
}

void stats_and_keep(const fdd::Problem& p, const at::Tensor& memory, const at::Tensor& pivots, const at::Tensor& reads,
                    const at::Tensor& moments) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  fdd::KeptValues kept = kept_values(p, memory);
  kept.compute();
  fdd::statistics_of(kept, statistics(pivots, reads, moments));
}

void grad_of_kept(const fdd::Problem& p, const at::Tensor& memory, const at::Tensor& pivots, const at::Tensor& reads,
                  const at::Tensor& moments, const at::Tensor& grad_reads, const at::Tensor& grad_moments,
                  const std::optional<at::Tensor>& grad_hidden, const std::optional<at::Tensor>& grad_weight,
                  const std::optional<at::Tensor>& grad_bias) {
  py::gil_scoped_release release;
  at::NoGradGuard no_grad;
  const fdd::Upstream upstream{grad_reads.const_data_ptr<float>(), grad_moments.const_data_ptr<float>()};
  fdd::gradients_of(kept_values(p, memory), statistics(pivots, reads, moments), upstream,
                    gradients(grad_hidden, grad_weight, grad_bias));
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  py::class_<fdd::Problem>(m, "Problem").def(py::init(&problem));
  m.attr("built_for") = kBuiltFor;
  m.def("stats", &stats);
  m.def("grad", &grad);
  m.def("kept_size", &fdd::KeptValues::size);
  m.def("stats_and_keep", &stats_and_keep);
  m.def("grad_of_kept", &grad_of_kept);
  m.def("divergences", &divergences);
  m.def("instruction_set", [] { return std::string(fdd::row_kernels().name); });
  m.def("product_library", [] { return std::string(fdd::product_library()); });
  m.def("narrow_products", &fdd::narrow_products);
}
