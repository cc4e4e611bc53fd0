// Vectors of FDD_LANES floats and their elementary functions, in namespace FDD_ISA.
// Included by row_kernels_impl.h.

namespace fdd::FDD_ISA {
namespace {

constexpr int64_t kLanes = FDD_LANES;
constexpr float kInfinity = __builtin_inff();
constexpr float kNear = 0.34f;  // |x| below which exp_tail(x) may be taken of x itself

typedef float Vec __attribute__((vector_size(4 * FDD_LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * FDD_LANES)));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof(v)); }
inline Vec splat(float x) { return Vec{} + x; }
inline Vec select(Mask m, Vec a, Vec b) { return m ? a : b; }
inline Vec max(Vec a, Vec b) { return select(a > b, a, b); }
inline Vec min(Vec a, Vec b) { return select(a < b, a, b); }
inline Vec abs(Vec x) { return select(x < 0, -x, x); }
inline Mask finite(Vec x) { return (x - x) == 0; }
inline Vec as_float(Mask m) {
  Vec v;
  __builtin_memcpy(&v, &m, sizeof(v));
  return v;
}
inline Mask as_bits(Vec v) {
  Mask m;
  __builtin_memcpy(&m, &v, sizeof(m));
  return m;
}
inline Mask first_lanes(int64_t count) {
  Mask m;
  for (int64_t i = 0; i < kLanes; ++i) m[i] = i < count ? -1 : 0;
  return m;
}
inline float sum(Vec v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
inline float largest_lane(Vec v) {
  float lane[kLanes];
  __builtin_memcpy(lane, &v, sizeof(v));
  for (int64_t half = kLanes / 2; half > 0; half /= 2)
    for (int64_t i = 0; i < half; ++i)
      lane[i] = lane[i] > lane[i + half] ? lane[i] : lane[i + half];
  return lane[0];
}

// Calls body(j, mask of the lanes in use) for every vector of a row.
template <class Body>
inline void for_each_vector(int64_t n, Body body) {
  const Mask all = first_lanes(kLanes);
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes) body(j, all);
  if (j < n) body(j, first_lanes(n - j));
}

// e^x = 2^k e^r with |r| <= ln(2)/2, relative error below 2^-22; 0 below -87.3, where results would
// be subnormal.
inline Vec exp_reduced(Vec x, Vec* power) {
  const Vec shifted =
      x * 1.44269504088896341f + 12582912.f;  // adding 1.5 * 2^23 rounds to an integer
  const Vec k = shifted - 12582912.f;
  *power = as_float((as_bits(shifted) - 0x4B400000 + 127) << 23);
  return (x - k * 0.693359375f) + k * 2.12194440e-4f;
}
// (e^r - 1 - r) / r^2
inline Vec exp_tail(Vec r) {
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  return p * r + 5.0000001201e-1f;
}
inline Vec exp(Vec x) {
  const Mask tiny = x < -87.3f;
  x = select(tiny, splat(-87.3f), select(x > 88.f, splat(88.f), x));
  Vec power;
  const Vec r = exp_reduced(x, &power);
  return select(tiny, Vec{}, (exp_tail(r) * r * r + r + 1.f) * power);
}
// e^x - 1 for x <= 0, accurate near 0.
inline Vec expm1_nonpositive(Vec x) {
  const Vec near = exp_tail(x) * x * x + x;
  return select(x > -kNear, near, exp(x) - 1.f);
}
// log(u) with u = 1 + y above 0, accurate near 1: log of u, plus what its rounding lost. `y` does
// not count where u is small.
inline Vec log_of(Vec u, Vec y) {
  const Vec lost = select(u > 0.5f, (y - (u - 1.f)) / u, u - u);  // NaN stays
  // u = m * 2^e with sqrt(1/2) <= m < sqrt(2)
  Mask e = ((as_bits(u) - 0x3F3504F3) >> 23);
  const Vec m = as_float(as_bits(u) - (e << 23));
  const Vec exponent = __builtin_convertvector(e, Vec);
  const Vec x = m - 1.f, square = x * x;
  Vec p = splat(7.0376836292e-2f);
  p = p * x - 1.1514610310e-1f;
  p = p * x + 1.1676998740e-1f;
  p = p * x - 1.2420140846e-1f;
  p = p * x + 1.4249322787e-1f;
  p = p * x - 1.6668057665e-1f;
  p = p * x + 2.0000714765e-1f;
  p = p * x - 2.4999993993e-1f;
  p = p * x + 3.3333331174e-1f;
  Vec result = p * x * square + exponent * -2.12194440e-4f - 0.5f * square + x;
  return result + exponent * 0.693359375f + lost;
}
inline Vec tanh(Vec x) {
  const Vec e = expm1_nonpositive(-2.f * abs(x));
  const Vec magnitude = -e / (2.f + e);
  return select(x < 0, -magnitude, magnitude);
}

// weight * factor with 0 * anything = 0, except of a weight that is NaN
inline Vec times(Vec weight, Vec factor) { return select(weight == 0, Vec{}, weight * factor); }

}  // namespace
}  // namespace fdd::FDD_ISA
