// The row kernels of one instruction set, in namespace FDD_ISA with vectors of FDD_LANES floats.
//
// row_kernels_*.cpp include this file after every other header and after the target pragma. No
// inline function of a library is then compiled for instructions that the processor may lack.

#include "vector_math_impl.h"
#include "divergences_impl.h"
#include "conversions_impl.h"

namespace fdd::FDD_ISA {
namespace {

inline Vec z_of(RowView row, float inv_temperature, int64_t j) {
  return (load(row.logits + j) - row.shift) * inv_temperature;
}

inline Vec vector_of(VectorView v, float inv_temperature, int64_t j) {
  Vec x = load(v.second + j) - v.shift_second;
  if (v.first) x -= load(v.first + j) - v.shift_first;
  return x * inv_temperature;
}

void transform(float* x, int64_t n, const float* bias, float scale, float softcap) {
  if (!bias && scale == 1.f && softcap == 0.f) return;
  for_each_vector(n, [&](int64_t j, Mask) {
    Vec u = load(x + j);
    if (bias) u += load(bias + j);
    u *= scale;
    if (softcap != 0.f) u = softcap * tanh(u / softcap);
    store(x + j, u);
  });
}

float largest(const float* u, int64_t n) {
  Vec best = splat(-kInfinity);
  for_each_vector(n, [&](int64_t j, Mask used) {
    const Vec v = load(u + j);
    best = select(used & finite(v), max(best, v), best);
  });
  const float found = largest_lane(best);
  return found == -kInfinity ? 0.f : found;
}

void softmax(const float* student, const float* teacher, float inv_temperature, int64_t n,
             Expectation of, SoftmaxState* state) {
  Vec best_s = splat(-kInfinity), best_t = best_s;
  for_each_vector(n, [&](int64_t j, Mask used) {
    best_s = select(used, max(best_s, load(student + j)), best_s);
    if (teacher) best_t = select(used, max(best_t, load(teacher + j)), best_t);
  });
  // While every logit so far is -inf the shifts must stay finite.
  const float lowest = -3.0e38f;
  const auto larger = [](float a, float b) { return a > b ? a : b; };
  const float max_s = larger(state->max_s, largest_lane(best_s)),
              max_t = larger(state->max_t, largest_lane(best_t));
  const float shift_s = larger(max_s, lowest), shift_t = larger(max_t, lowest);
  Vec total_s{}, total_t{}, weighted{}, excess{}, difference{};
  const auto expect = [&](Vec e, Vec other, Vec x) {
    const Mask near = abs(x) < kNear;
    const Vec first = times(e, x), gap = other - e, second = e * (exp_tail(x) * x * x);
    weighted -= first;
    excess += select(near, second, gap - first);
    difference += select(near, first + second, gap);
  };
  for_each_vector(n, [&](int64_t j, Mask used) {
    const Vec z_s = (load(student + j) - shift_s) * inv_temperature;
    const Vec e_s = select(used, exp(z_s), Vec{});
    total_s += e_s;
    if (!teacher) return;
    const Vec z_t = (load(teacher + j) - shift_t) * inv_temperature;
    const Vec e_t = select(used, exp(z_t), Vec{});
    total_t += e_t;
    if (of == Expectation::kTeacher) expect(e_t, e_s, z_s - z_t);
    if (of == Expectation::kStudent) expect(e_s, e_t, z_t - z_s);
  });
  // Restate the sums so far about the new shifts: every e changes by one factor, every x by
  // `moved`.
  const double off_s = (double(state->max_s) - shift_s) * inv_temperature,
               off_t = (double(state->max_t) - shift_t) * inv_temperature;
  const double scale_s = __builtin_exp(off_s), scale_t = __builtin_exp(off_t);
  const bool of_student = of == Expectation::kStudent;
  const double scale = of_student ? scale_s : scale_t, other_scale = of_student ? scale_t : scale_s;
  const double total = of_student ? state->total_s : state->total_t,
               moved = of_student ? off_t - off_s : off_s - off_t;
  if (scale > 0 && total > 0) {
    state->excess = scale * (state->excess - moved * total) +
                    (other_scale - scale) * (state->difference + total);
    state->weighted = scale * (state->weighted - moved * total);
  } else {
    state->excess = other_scale * (state->difference + total);
    state->weighted = 0;
  }
  state->difference = other_scale * state->difference + (other_scale - scale) * total;
  state->total_s = state->total_s * scale_s + sum(total_s);
  state->total_t = state->total_t * scale_t + sum(total_t);
  state->weighted += sum(weighted);
  state->excess += sum(excess);
  state->difference += sum(difference);
  state->max_s = max_s;
  state->max_t = max_t;
}

// The lanes of tokens that moments are taken over.
inline Mask live_lanes(Mask used, const float* excluded, int64_t j) {
  return excluded ? used & (load(excluded + j) == 0) : used;
}

void moments(VectorView s, VectorView t, const float* excluded, float inv_temperature, int64_t n,
             MomentState* state) {
  // Sum about numbers close to the tile's means: the running means, or the first tile's own.
  Vec live_count{}, base_sum_s{}, base_sum_t{};
  float base_s = float(state->mean_s), base_t = float(state->mean_t);
  if (state->count == 0) {
    for_each_vector(n, [&](int64_t j, Mask used) {
      const Vec a = vector_of(s, inv_temperature, j), b = vector_of(t, inv_temperature, j);
      const Mask live = live_lanes(used, excluded, j);
      live_count += select(live, splat(1.f), Vec{});
      base_sum_s += select(live, a, Vec{});
      base_sum_t += select(live, b, Vec{});
    });
    const float count = sum(live_count);
    if (count == 0) return;
    base_s = sum(base_sum_s) / count;
    base_t = sum(base_sum_t) / count;
    live_count = Vec{};
  }
  Vec sum_s{}, sum_t{}, ss{}, tt{}, st{}, dd{};
  for_each_vector(n, [&](int64_t j, Mask used) {
    Vec a = vector_of(s, inv_temperature, j), b = vector_of(t, inv_temperature, j);
    const Mask live = live_lanes(used, excluded, j);
    a = select(live, a - base_s, Vec{});
    b = select(live, b - base_t, Vec{});
    const Vec d = a - b;
    live_count += select(live, splat(1.f), Vec{});
    sum_s += a;
    sum_t += b;
    ss += a * a;
    tt += b * b;
    st += a * b;
    dd += d * d;
  });
  const double count = sum(live_count);
  if (count == 0) return;
  // Means of the tile, then the merge with the tokens so far (Chan, Golub and LeVeque).
  const double off_s = sum(sum_s) / count, off_t = sum(sum_t) / count;
  const double mean_s = base_s + off_s, mean_t = base_t + off_t;
  const double all = state->count + count, share = count / all, cross = state->count * share;
  const double delta_s = mean_s - state->mean_s, delta_t = mean_t - state->mean_t;
  state->m_ss += sum(ss) - count * off_s * off_s + cross * delta_s * delta_s;
  state->m_tt += sum(tt) - count * off_t * off_t + cross * delta_t * delta_t;
  state->m_st += sum(st) - count * off_s * off_t + cross * delta_s * delta_t;
  state->m_dd += sum(dd) - count * (off_s - off_t) * (off_s - off_t) +
                 cross * (delta_s - delta_t) * (delta_s - delta_t);
  state->mean_s += delta_s * share;
  state->mean_t += delta_t * share;
  state->count = all;
}

void divergence(RowView student, RowView teacher, float inv_temperature, int64_t n,
                Divergence divergence, const float* constants, double* value, double* grad_sum) {
  Vec values{}, grads{};
  for_each_vector(n, [&](int64_t j, Mask used) {
    const Vec log_q = z_of(student, inv_temperature, j) - student.log_sum_exp;
    const Vec log_p = z_of(teacher, inv_temperature, j) - teacher.log_sum_exp;
    values += select(used, divergence_value(divergence, log_q, log_p, constants), Vec{});
    grads += select(used, divergence_grad(divergence, log_q, log_p, constants), Vec{});
  });
  *value += sum(values);
  *grad_sum += sum(grads);
}

void request_gradient(float* grad, RowView student, const RowView* teacher, float inv_temperature,
                      int64_t n, Divergence divergence, const float* constants,
                      RequestGradient upstream) {
  // dL/dz = value * (grad(log q, log p) - q * sum of grad) + log_sum_exp * q. Without a teacher
  // `grad` is the label's, which the caller adds, and its sum is -1.
  const float of_q = upstream.log_sum_exp - upstream.value * upstream.grad_sum;
  for_each_vector(n, [&](int64_t j, Mask) {
    const Vec log_q = z_of(student, inv_temperature, j) - student.log_sum_exp;
    Vec grad_z = of_q * exp(log_q);
    if (teacher && divergence != Divergence::kNone) {
      const Vec log_p = z_of(*teacher, inv_temperature, j) - teacher->log_sum_exp;
      grad_z += upstream.value * divergence_grad(divergence, log_q, log_p, constants);
    }
    store(grad + j, load(grad + j) + grad_z * inv_temperature);
  });
}

void moment_gradient(float* grad_second, float* grad_first, VectorView s, VectorView t,
                     const float* excluded, float inv_temperature, int64_t n,
                     MomentGradient upstream) {
  for_each_vector(n, [&](int64_t j, Mask used) {
    const Vec a = vector_of(s, inv_temperature, j) - upstream.mean_s;
    const Vec b = vector_of(t, inv_temperature, j) - upstream.mean_t;
    Vec grad = 2.f * upstream.of_ss * a + upstream.of_st * b + 2.f * upstream.of_dd * (a - b) +
               upstream.of_mean;
    grad = select(live_lanes(used, excluded, j), grad * inv_temperature, Vec{});
    store(grad_second + j, load(grad_second + j) + grad);
    if (grad_first) store(grad_first + j, load(grad_first + j) - grad);
  });
}

void chain(float* grad, const float* u, int64_t n, float scale, float softcap) {
  if (scale == 1.f && softcap == 0.f) return;
  for_each_vector(n, [&](int64_t j, Mask) {
    Vec g = load(grad + j) * scale;
    if (softcap != 0.f) {
      const Vec ratio = load(u + j) / softcap;
      g *= 1.f - ratio * ratio;
    }
    store(grad + j, g);
  });
}

}  // namespace

const RowKernels kKernels = {
    FDD_ISA_NAME,    transform, largest,       softmax,   moments,     divergence, request_gradient,
    moment_gradient, chain,     from_bfloat16, from_half, to_bfloat16, transpose,  interleave};

}  // namespace fdd::FDD_ISA
