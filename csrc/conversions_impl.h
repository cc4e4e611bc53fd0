// Conversion, transposition and interleaving of rows. Included by row_kernels_impl.h.

namespace fdd::FDD_ISA {
namespace {

void from_bfloat16(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = uint32_t(in[i]) << 16;
    __builtin_memcpy(out + i, &bits, 4);
  }
}

void from_half(const uint16_t* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = in[i] & 0x7FFFu, sign = uint32_t(in[i] & 0x8000u) << 16;
    // The exponent's bias differs by 112; multiplying also normalises subnormals.
    uint32_t bits = magnitude << 13;
    float value;
    __builtin_memcpy(&value, &bits, 4);
    value *= 5.192296858534828e33f;
    __builtin_memcpy(&bits, &value, 4);
    if (magnitude >= 0x7C00u) bits |= 0x7F800000u;
    bits |= sign;
    __builtin_memcpy(out + i, &bits, 4);
  }
}

inline uint32_t rounded_to_bfloat16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  return (bits + 0x7FFFu + ((bits >> 16) & 1u)) & 0xFFFF0000u;
}

void to_bfloat16(const float* in, uint16_t* high, uint16_t* low, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = rounded_to_bfloat16(in[i]);
    float value;
    __builtin_memcpy(&value, &bits, 4);
    high[i] = uint16_t(bits >> 16);
    low[i] = uint16_t(rounded_to_bfloat16(in[i] - value) >> 16);
  }
}

// Lanes without bit S from `a`, the others from `b` moved up by S; and the rest of both, moved
// down.
template <int S, int... I>
inline Vec low_lanes(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & S) ? FDD_LANES + I - S : I)...);
}
template <int S, int... I>
inline Vec high_lanes(Vec a, Vec b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, ((I & S) ? FDD_LANES + I : I + S)...);
}

// Transposes a square of kLanes x kLanes: in squares of S within it, the off-diagonal ones change
// places.
template <int S>
inline void transpose_square(Vec* rows) {
  constexpr auto lanes = std::make_integer_sequence<int, FDD_LANES>();
  for (int i = 0; i < kLanes; ++i) {
    if (i & S) continue;
    const Vec a = rows[i], b = rows[i + S];
    rows[i] = low_lanes<S>(a, b, lanes);
    rows[i + S] = high_lanes<S>(a, b, lanes);
  }
  if constexpr (2 * S < FDD_LANES) transpose_square<2 * S>(rows);
}

// Stores a vector past the caches where there is FDD_STREAM: it is not loaded into them first. `to`
// is aligned to a vector.
inline void stream(float* to, Vec v) {
#if !defined(FDD_STREAM)
  store(to, v);
#elif defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec*>(to));
#else
  FDD_STREAM(to, v);
#endif
}

template <bool kStream>
inline void transpose_by(const float* in, int64_t ld_in, int64_t rows, int64_t columns, float* out,
                         int64_t ld_out) {
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t r = 0; r < rows; r += kLanes) {
      if (r + kLanes <= rows && c + kLanes <= columns) {
        Vec square[kLanes];
        for (int64_t i = 0; i < kLanes; ++i) square[i] = load(in + (r + i) * ld_in + c);
        transpose_square<1>(square);
        for (int64_t i = 0; i < kLanes; ++i) {
          float* to = out + (c + i) * ld_out + r;
          if constexpr (kStream)
            stream(to, square[i]);
          else
            store(to, square[i]);
        }
      } else {
        for (int64_t j = c; j < columns && j < c + kLanes; ++j)
          for (int64_t i = r; i < rows && i < r + kLanes; ++i)
            out[j * ld_out + i] = in[i * ld_in + j];
      }
    }
}

void transpose(const float* in, int64_t ld_in, int64_t rows, int64_t columns, float* out,
               int64_t ld_out) {
  transpose_by<false>(in, ld_in, rows, columns, out, ld_out);
}

void transpose_to_memory(const float* in, int64_t ld_in, int64_t rows, int64_t columns, float* out,
                         int64_t ld_out) {
  if ((reinterpret_cast<uintptr_t>(out) | sizeof(float) * ld_out) % sizeof(Vec))
    return transpose(in, ld_in, rows, columns, out, ld_out);
  transpose_by<true>(in, ld_in, rows, columns, out, ld_out);
#if defined(FDD_STREAM)
  _mm_sfence();  // before anything that tells other threads of them
#endif
}

void interleave(const uint16_t* first, const uint16_t* second, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t pair = uint32_t(first[i]) | uint32_t(second[i]) << 16;
    __builtin_memcpy(out + 2 * i, &pair, 4);
  }
}

void separate(const uint16_t* in, uint16_t* first, uint16_t* second, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t pair;
    __builtin_memcpy(&pair, in + 2 * i, 4);
    first[i] = uint16_t(pair);
    second[i] = uint16_t(pair >> 16);
  }
}

}  // namespace
}  // namespace fdd::FDD_ISA
