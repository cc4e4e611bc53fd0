// Prints what the row kernels of every processor make of fixed inputs, one line per result:
//     name length number number ...
// tests/tools/cross_compile.py compares the lines of two architectures. Logits are from 1 to 9, and
// the teacher's differ from the student's by 0.25 to 2: no sum or difference cancels by more than
// the bound there allows.
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "row_kernels.h"

namespace {

const fdd::RowKernels& kernels = fdd::row_kernels_generic();
using Floats = std::vector<float>;
using Halves = std::vector<uint16_t>;

void print(const std::string& name, int64_t n, const std::vector<double>& numbers) {
  std::printf("%s %lld", name.c_str(), static_cast<long long>(n));
  for (double number : numbers) std::printf(" %.17g", number);
  std::printf("\n");
}

template <class T>
void print_row(const std::string& name, int64_t n, const std::vector<T>& row) {
  print(name, n, {row.begin(), row.begin() + n});
}

// Numbers from 0 to 1, the same everywhere.
float next() {
  static uint32_t state = 17;
  state = state * 1664525u + 1013904223u;
  return float(state >> 8) / 16777216.f;
}

// Padded as rows of a tile are.
Floats floats(int64_t n, float low, float high) {
  Floats row(n + 2 * fdd::kPadding);
  for (float& x : row) x = low + (high - low) * next();
  return row;
}

struct Case {
  int64_t n;
  Floats student, teacher, excluded, bias;
  float inv_temperature = 0.5f, log_sum_exp = 6.f;
  fdd::RowView of_student() const { return {student.data(), 9.f, log_sum_exp}; }
  fdd::RowView of_teacher() const { return {teacher.data(), 9.f, log_sum_exp}; }
  fdd::VectorView vector(const Floats& second) const { return {second.data(), nullptr, 0.f, 0.f}; }
};

Case make(int64_t n) {
  Case c{n, floats(n, 3, 7), {}, Floats(n + 2 * fdd::kPadding), floats(n, 0, 1)};
  c.teacher = c.student;
  for (float& x : c.teacher) x += (next() < 0.5f ? -1.f : 1.f) * (0.25f + 1.75f * next());
  for (int64_t i = 3; i < n; i += 5) c.excluded[i] = -__builtin_inff();
  return c;
}

void elementwise(const Case& c) {
  for (float softcap : {0.f, 4.f}) {
    Floats row = c.student;
    kernels.transform(row.data(), c.n, c.bias.data(), 0.75f, softcap);
    print_row("transform", c.n, row);
    Floats grad = c.bias;
    kernels.chain(grad.data(), row.data(), c.n, 0.75f, softcap);
    print_row("chain", c.n, grad);
  }
  print("largest", c.n, {kernels.largest(c.student.data(), c.n)});
}

void softmax(const Case& c) {
  for (float teacher_mix : {1.f, 0.5f})
    for (auto of : {fdd::Expectation::kTeacher, fdd::Expectation::kStudent}) {
      const float lowest = -__builtin_inff();
      fdd::SoftmaxState s{lowest, lowest, lowest, 0, 0, 0, 0, 0};
      for (auto [first, end] : {std::pair(int64_t(0), c.n / 2), std::pair(c.n / 2, c.n)})
        kernels.softmax(c.student.data() + first, c.teacher.data() + first, teacher_mix,
                        c.inv_temperature, end - first, of, &s);
      for (double sum : {double(s.max_s), double(s.max_t), s.total_s, s.total_t, s.excess})
        print("softmax", c.n, {sum});
    }
}

std::vector<double> parameters_of(fdd::Divergence divergence) {
  if (divergence == fdd::Divergence::kAlphaBeta) return {0.25, 0.5};
  const bool mixture = divergence == fdd::Divergence::kJsd ||
                       divergence == fdd::Divergence::kSkewKl ||
                       divergence == fdd::Divergence::kSkewReverseKl;
  return mixture ? std::vector{0.25} : std::vector<double>{};
}

void divergences(const Case& c) {
  for (const auto& [name, divergence] : fdd::kDivergences) {
    if (divergence == fdd::Divergence::kNone || divergence == fdd::Divergence::kNll) continue;
    const Floats constants = fdd::divergence_constants(divergence, parameters_of(divergence));
    const fdd::RowView teacher = c.of_teacher();
    double value = 0, grad_sum = 0;
    kernels.divergence(c.of_student(), teacher, 1.f, c.inv_temperature, c.n, divergence,
                       constants.data(), &value, &grad_sum);
    print(name, c.n, {value});
    Floats grad(c.n + 2 * fdd::kPadding);
    kernels.request_gradient(grad.data(), c.of_student(), &teacher, 1.f, c.inv_temperature, c.n,
                             divergence, constants.data(), {0.25f, 1.f, 0.5f});
    print_row(std::string(name) + "_gradient", c.n, grad);
  }
}

void moments(const Case& c) {
  const fdd::VectorView s = c.vector(c.student), t = c.vector(c.teacher);
  for (bool weighted : {false, true}) {
    fdd::MomentState m{};
    if (weighted)
      kernels.weighted_moments(s, t, c.excluded.data(), c.inv_temperature, c.n, &m);
    else
      kernels.moments(s, t, c.excluded.data(), c.n, &m);
    const std::string name = weighted ? "weighted_moments" : "moments";
    for (double sum :
         {m.count, m.origin_s + m.mean_s, m.origin_t + m.mean_t, m.m_ss, m.m_tt, m.m_dd})
      print(name, c.n, {sum});
    Floats grad(c.n + 2 * fdd::kPadding);
    kernels.moment_gradient(grad.data(), nullptr, s, t, c.excluded.data(), c.inv_temperature, c.n,
                            {2.5f, 2.5f, 0.5f, 0.25f, -0.5f, 1.f, weighted, 4.f, 3.f, 2.f});
    print_row(name + "_gradient", c.n, grad);
  }
}

void conversions(const Case& c) {
  Halves high(c.n), low(c.n), pairs(2 * c.n);
  kernels.to_bfloat16(c.student.data(), high.data(), low.data(), c.n);
  print_row("to_bfloat16", c.n, high);
  print_row("to_bfloat16", c.n, low);
  kernels.interleave(high.data(), low.data(), pairs.data(), c.n);
  print_row("interleave", 2 * c.n, pairs);
  Halves first(c.n), second(c.n);
  kernels.separate(pairs.data(), first.data(), second.data(), c.n);
  print_row("separate", c.n, first);
  print_row("separate", c.n, second);
  Floats back(c.n);
  kernels.from_bfloat16(high.data(), back.data(), c.n);
  print_row("from_bfloat16", c.n, back);
  for (int64_t i = 0; i < c.n; ++i) high[i] = uint16_t(i * 397 % 0x7C00);  // subnormal ones too
  kernels.from_half(high.data(), back.data(), c.n);
  print_row("from_half", c.n, back);
  const int64_t rows = 11;
  const Floats matrix = floats(rows * c.n, -1, 1);
  Floats transposed(rows * c.n);
  kernels.transpose(matrix.data(), c.n, rows, c.n, transposed.data(), rows);
  print_row("transpose", rows * c.n, transposed);
}

}  // namespace

int main() {
  std::printf("set %s\n", kernels.name);
  for (int64_t n : {3, 4, 7, 300}) {
    const Case c = make(n);
    elementwise(c);
    softmax(c);
    divergences(c);
    moments(c);
    conversions(c);
  }
}
