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

// Logits of the mixture from both models' shifted logits; -inf where either is.
inline Vec mixed(Vec student, Vec teacher, float teacher_mix) {
  return select(teacher == -kInfinity, teacher,
                (1.f - teacher_mix) * student + teacher_mix * teacher);
}

// log p: of the teacher, or of the mixture in its place.
inline Vec log_p_of(RowView student, RowView teacher, float teacher_mix, float inv_temperature,
                    int64_t j) {
  Vec u = load(teacher.logits + j) - teacher.shift;
  if (teacher_mix < 1) u = mixed(load(student.logits + j) - student.shift, u, teacher_mix);
  return u * inv_temperature - teacher.log_sum_exp;
}

// s or t of the tokens from j, before the temperature; load_at loads one or several.
template <class Load>
inline auto vector_of(VectorView v, int64_t j, Load load_at) {
  auto x = load_at(v.second + j) - v.shift_second;
  if (v.first) x -= load_at(v.first + j) - v.shift_first;
  return x;
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

void softmax(const float* student, const float* teacher, float teacher_mix, float inv_temperature,
             int64_t n, Expectation of, SoftmaxState* state) {
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
  const auto shifted_t = [&](int64_t j) {
    const Vec u = load(teacher + j) - shift_t;
    return teacher_mix < 1 ? mixed(load(student + j) - shift_s, u, teacher_mix) : u;
  };
  // The mixture's largest logit may be far below both shifts: it has a shift of its own, relative
  // to the mixed shifts.
  float shift_mix = 0;
  double before_t = state->max_t, now_t = shift_t;
  if (teacher && teacher_mix < 1) {
    Vec best = splat(-kInfinity);
    for_each_vector(n, [&](int64_t j, Mask used) {
      best = select(used, max(best, shifted_t(j)), best);
    });
    const double mixed_shift = (1 - double(teacher_mix)) * shift_s + double(teacher_mix) * shift_t;
    before_t = state->max_mix;
    shift_mix = larger(larger(float(before_t - mixed_shift), largest_lane(best)), lowest);
    now_t = mixed_shift + shift_mix;
    if (shift_mix > lowest) state->max_mix = now_t;
  }
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
    const Vec z_t = (shifted_t(j) - shift_mix) * inv_temperature;
    const Vec e_t = select(used, exp(z_t), Vec{});
    total_t += e_t;
    if (of == Expectation::kTeacher) expect(e_t, e_s, z_s - z_t);
    if (of == Expectation::kStudent) expect(e_s, e_t, z_t - z_s);
  });
  // Restate the sums so far about the new shifts: every e changes by one factor, every x by
  // `moved`.
  const double off_s = (double(state->max_s) - shift_s) * inv_temperature,
               off_t = (before_t - now_t) * inv_temperature;
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

// Sums over a tile of w, w a, w b, w a^2, w b^2, w a b and w (a - b)^2, with weights w and the
// differences a and b of the vectors from a base.
struct TileSums {
  float base_s, base_t;
  Vec w{}, a{}, b{}, aa{}, bb{}, ab{}, dd{};

  void add(Vec weight, Vec s, Vec t) {
    const Vec d = s - t, ws = weight * s, wt = weight * t;
    w += weight;
    a += ws;
    b += wt;
    aa += ws * s;
    bb += wt * t;
    ab += ws * t;
    dd += weight * d * d;
  }

  // Merges the tile with the tokens so far (Chan, Golub and LeVeque). The means become relative to
  // a new origin.
  void merge_into(MomentState* m, double origin_s, double origin_t) const {
    const double before = m->count, total = before + sum(w);
    // the means so far, and the new ones, relative to the base
    const double old_s = m->origin_s - base_s + m->mean_s, old_t = m->origin_t - base_t + m->mean_t;
    const double new_s = (before * old_s + sum(a)) / total,
                 new_t = (before * old_t + sum(b)) / total;
    const double old_d = old_s - old_t, new_d = new_s - new_t;
    m->m_ss += before * old_s * old_s + sum(aa) - total * new_s * new_s;
    m->m_tt += before * old_t * old_t + sum(bb) - total * new_t * new_t;
    m->m_st += before * old_s * old_t + sum(ab) - total * new_s * new_t;
    m->m_dd += before * old_d * old_d + sum(dd) - total * new_d * new_d;
    m->mean_s = base_s - origin_s + new_s;
    m->mean_t = base_t - origin_t + new_t;
    m->origin_s = origin_s;
    m->origin_t = origin_t;
    m->count = total;
  }
};

// Sums of a tile's live tokens; weight_of(j, live) are the weights of the tokens from j.
template <class Weight>
inline TileSums sums_about(float base_s, float base_t, VectorView s, VectorView t,
                           const float* excluded, int64_t n, Weight weight_of) {
  TileSums sums{base_s, base_t};
  for_each_vector(n, [&](int64_t j, Mask used) {
    const Mask live = live_lanes(used, excluded, j);
    const Vec a = vector_of(s, j, load) - base_s, b = vector_of(t, j, load) - base_t;
    sums.add(select(live, weight_of(j, live), Vec{}), select(live, a, Vec{}),
             select(live, b, Vec{}));
  });
  return sums;
}

void moments(VectorView s, VectorView t, const float* excluded, int64_t n, MomentState* state) {
  // Sum about numbers close to the tile's means: the running means, or the first tile's own.
  const auto about = [&](float base_s, float base_t) {
    return sums_about(base_s, base_t, s, t, excluded, n,
                      [](int64_t, Mask) { return splat(1.f); });
  };
  float base_s = float(state->mean_s), base_t = float(state->mean_t);
  if (state->count == 0) {
    const TileSums tile = about(0.f, 0.f);
    const float count = sum(tile.w);
    if (count == 0) return;
    base_s = sum(tile.a) / count;
    base_t = sum(tile.b) / count;
  }
  about(base_s, base_t).merge_into(state, 0, 0);
}

// The live token with the largest logit; -1 if there is none above -inf.
int64_t largest_live(const float* logits, const float* excluded, int64_t n) {
  Vec best = splat(-kInfinity);
  for_each_vector(n, [&](int64_t j, Mask used) {
    best = select(live_lanes(used, excluded, j), max(load(logits + j), best), best);
  });
  const float found = largest_lane(best);
  for (int64_t j = 0; found > -kInfinity && j < n; ++j)
    if (logits[j] == found && !(excluded && excluded[j] != 0)) return j;
  return -1;
}

// Restates the sums so far about another largest logit.
inline void set_largest(MomentState* m, float largest, float inv_temperature) {
  const double scale = __builtin_exp((double(m->largest) - largest) * inv_temperature);
  for (double* of : {&m->count, &m->m_ss, &m->m_tt, &m->m_st, &m->m_dd})
    if (*of != 0) *of *= scale;
  m->largest = largest;
}

void weighted_moments(VectorView s, VectorView t, const float* excluded, float inv_temperature,
                      int64_t n, MomentState* state) {
  Vec best;
  const auto about = [&](float base_s, float base_t) {
    best = splat(-kInfinity);
    return sums_about(base_s, base_t, s, t, excluded, n, [&](int64_t j, Mask live) {
      const Vec u = load(t.second + j);
      best = select(live, max(u, best), best);
      return exp((u - state->largest) * inv_temperature);
    });
  };
  // Most tiles have a small part of the weight: one pass about the running means is enough. A tile
  // that outweighs all before is summed about its likeliest token, which may be nearly all its
  // weight: the sums are then those of the other tokens.
  bool rises = true, outweighs = true;
  TileSums tile;
  if (state->count != 0) {
    tile = about(float(state->origin_s + state->mean_s), float(state->origin_t + state->mean_t));
    rises = largest_lane(best) > state->largest;
    outweighs = sum(tile.w) > state->count;
  }
  const int64_t top = rises || outweighs ? largest_live(t.second, excluded, n) : -1;
  if (top < 0) rises = false;
  float top_s = 0, top_t = 0;
  if (top >= 0) {
    const auto load_one = [](const float* p) { return *p; };
    top_s = vector_of(s, top, load_one);
    top_t = vector_of(t, top, load_one);
  }
  if (outweighs) {
    if (rises) set_largest(state, t.second[top], inv_temperature);
    tile = about(top_s, top_t);
    if (sum(tile.w) == 0) return;  // no live token
  }
  if (rises)
    tile.merge_into(state, top_s, top_t);
  else
    tile.merge_into(state, state->origin_s, state->origin_t);
  if (rises) set_largest(state, t.second[top], inv_temperature);
}

void divergence(RowView student, RowView teacher, float teacher_mix, float inv_temperature,
                int64_t n, Divergence divergence, const float* constants, double* value,
                double* grad_sum) {
  Vec values{}, grads{};
  for_each_vector(n, [&](int64_t j, Mask used) {
    const Vec log_q = z_of(student, inv_temperature, j) - student.log_sum_exp;
    const Vec log_p = log_p_of(student, teacher, teacher_mix, inv_temperature, j);
    values += select(used, divergence_value(divergence, log_q, log_p, constants), Vec{});
    grads += select(used, divergence_grad(divergence, log_q, log_p, constants), Vec{});
  });
  *value += sum(values);
  *grad_sum += sum(grads);
}

void request_gradient(float* grad, RowView student, const RowView* teacher, float teacher_mix,
                      float inv_temperature, int64_t n, Divergence divergence,
                      const float* constants, RequestGradient upstream) {
  // dL/dz = value * (grad(log q, log p) - q * sum of grad) + log_sum_exp * q. Without a teacher
  // `grad` is the label's, which the caller adds, and its sum is -1. With one, the difference is
  // formed first: it is exactly 0 where the models agree.
  const bool compares = teacher && divergence != Divergence::kNone;
  const float of_label = compares ? 0.f : upstream.value * upstream.grad_sum;
  const float of_q = upstream.log_sum_exp - of_label;
  for_each_vector(n, [&](int64_t j, Mask) {
    const Vec log_q = z_of(student, inv_temperature, j) - student.log_sum_exp;
    const Vec q = exp(log_q);
    Vec grad_z = of_q * q;
    if (compares) {
      const Vec log_p = log_p_of(student, *teacher, teacher_mix, inv_temperature, j);
      grad_z += upstream.value * (divergence_grad(divergence, log_q, log_p, constants) -
                                  q * upstream.grad_sum);
    }
    store(grad + j, load(grad + j) + grad_z * inv_temperature);
  });
}

void moment_gradient(float* grad_second, float* grad_first, VectorView s, VectorView t,
                     const float* excluded, float inv_temperature, int64_t n,
                     MomentGradient upstream) {
  for_each_vector(n, [&](int64_t j, Mask used) {
    Vec a = vector_of(s, j, load) * inv_temperature - upstream.mean_s;
    Vec b = vector_of(t, j, load) * inv_temperature - upstream.mean_t;
    Vec weight = splat(1.f);
    if (upstream.weighted) {
      weight = exp((load(t.second + j) - t.shift_second) * inv_temperature - upstream.log_total);
      const Mask is_top = weight > kCertain;
      a = select(is_top, splat(upstream.top_s), a);
      b = select(is_top, splat(upstream.top_t), b);
    }
    Vec grad = weight * (2.f * upstream.of_ss * a + upstream.of_st * b +
                         2.f * upstream.of_dd * (a - b) + upstream.of_mean);
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
    FDD_ISA_NAME,     transform,  largest,          softmax,         moments,
    weighted_moments, divergence, request_gradient, moment_gradient, chain,
    from_bfloat16,    from_half,  to_bfloat16,      transpose,       transpose_to_memory,
    interleave,       separate};

}  // namespace fdd::FDD_ISA
