// SPDX-License-Identifier: Apache-2.0
//
// Transform and quantization of tokens, for CPUs, in float32: blocks of T, the Hadamard
// matrix, and integers with one scale a token.
//
// A few tokens share a pass over T, which must come from memory: threads take blocks of it.
// Many tokens are divided among threads, and transformed a chunk at a time, in the cache.
//
// The Hadamard matrix is a Kronecker product M x S of a matrix M and Sylvester's matrix S,
// which takes sums and differences instead of products.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#if (defined(__AVX512F__) || defined(__FMA__)) && !defined(CAT_PLAIN_LOOPS)
#include <immintrin.h>
#endif

// GCC has the first since version 12
#if __has_builtin(__builtin_shufflevector)
#define CAT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CAT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Words){__VA_ARGS__})
#endif

#ifndef CAT_LIBRARY
#define CAT_LIBRARY cat_modifier
#endif

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// ---- vectors -----------------------------------------------------------------------------

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(16)));
typedef uint16_t Shorts __attribute__((vector_size(32), aligned(2), may_alias));

inline Floats multiply_add(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__) && !defined(CAT_PLAIN_LOOPS)
  return (Floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) && !defined(CAT_PLAIN_LOOPS)
  __m256 x[2], y[2], z[2];
  std::memcpy(x, &a, 64), std::memcpy(y, &b, 64), std::memcpy(z, &c, 64);
  for (int i = 0; i < 2; ++i) z[i] = _mm256_fmadd_ps(x[i], y[i], z[i]);
  std::memcpy(&c, z, 64);
  return c;
#else
  return a * b + c;
#endif
}

inline Floats load(const float* p) { return *reinterpret_cast<const Floats*>(p); }

inline Floats load(const BFloat16* p) {
  const Words high = __builtin_convertvector(*reinterpret_cast<const Shorts*>(p), Words) << 16;
  return (Floats)high;
}

inline Floats load(const Half* p) {
#if defined(__AVX512F__) && !defined(CAT_PLAIN_LOOPS)
  return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#else
  Floats values;
  for (int i = 0; i < kLanes; ++i) values[i] = static_cast<float>(p[i]);
  return values;
#endif
}

inline Floats load(const int8_t* p) {
#if defined(__AVX512F__) && !defined(CAT_PLAIN_LOOPS)
  const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(bytes));
#else
  Floats values;
  for (int i = 0; i < kLanes; ++i) values[i] = p[i];
  return values;
#endif
}

inline void store(float* p, Floats values) { *reinterpret_cast<Floats*>(p) = values; }

// of values that bfloat16 holds
inline void store(BFloat16* p, Floats values) {
  const Words high = (Words)values >> 16;
#if defined(__AVX512F__) && !defined(CAT_PLAIN_LOOPS)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)high));
#else
  *reinterpret_cast<Shorts*>(p) = __builtin_convertvector(high, Shorts);
#endif
}

inline void store(Half* p, Floats values) {
#if defined(__AVX512F__) && !defined(CAT_PLAIN_LOOPS)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)values, 0));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<Half>(values[i]);
#endif
}

// Load `count` values, at most kLanes, and zeros.
template <typename In>
inline Floats load(const In* p, int64_t count) {
  alignas(64) In values[kLanes];
  std::memset(static_cast<void*>(values), 0, sizeof(values));
  std::memcpy(static_cast<void*>(values), p, count * sizeof(In));
  return load(values);
}

inline Bytes last_bytes(Words words) {
#if defined(__AVX512F__) && !defined(CAT_PLAIN_LOOPS)
  return (Bytes)_mm512_cvtepi32_epi8((__m512i)words);
#else
  return __builtin_convertvector(words, Bytes);
#endif
}

// ---- products with the blocks of T ---------------------------------------------------------

// One step of a sum of products. The compiler keeps the 16 sums of a tile in registers.
template <typename In>
struct Step {
  static constexpr int kInputs = kLanes;
  using Operand = Floats;
  template <typename Entry>
  static Operand get(const Entry* p) {
    return load(p);
  }
  template <typename Entry>
  static Operand get(const Entry* p, int64_t count) {
    return load(p, count);
  }
  static Floats add(Floats sum, Operand t, Operand x) { return multiply_add(t, x, sum); }
};

#if defined(__AVX512BF16__) && !defined(CAT_PLAIN_LOOPS)
// Products of two bfloat16 are exact in float32.
template <>
struct Step<BFloat16> {
  static constexpr int kInputs = 2 * kLanes;
  using Operand = __m512bh;
  static Operand get(const BFloat16* p) { return (__m512bh)_mm512_loadu_si512(p); }
  static Operand get(const BFloat16* p, int64_t count) {
    return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32)((1ull << count) - 1), p);
  }
  static Operand get(const int8_t* p) {
    return _mm512_cvtne2ps_pbh((__m512)load(p + kLanes), (__m512)load(p));
  }
  static Operand get(const int8_t* p, int64_t count) {
    alignas(64) int8_t values[kInputs] = {};
    std::memcpy(values, p, count);
    return get(values);
  }
  static Floats add(Floats sum, Operand t, Operand x) {
    return (Floats)_mm512_dpbf16_ps((__m512)sum, t, x);
  }
};
#endif

// Sum over the lanes of 16 vectors: lane i is the sum of the lanes of sums[i].
inline Floats add_lanes(const Floats* sums) {
  Floats by8[8], by4[4], by2[2];
#pragma GCC unroll 16
  for (int i = 0; i < 8; ++i) {
    const Floats a = sums[2 * i], b = sums[2 * i + 1];
    by8[i] = CAT_SHUFFLE(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
             CAT_SHUFFLE(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 4; ++i) {
    const Floats a = by8[2 * i], b = by8[2 * i + 1];
    by4[i] = CAT_SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
             CAT_SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
  }
#pragma GCC unroll 16
  for (int i = 0; i < 2; ++i) {
    const Floats a = by4[2 * i], b = by4[2 * i + 1];
    by2[i] = CAT_SHUFFLE(a, b, 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
             CAT_SHUFFLE(a, b, 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
  }
  const Floats a = by2[0], b = by2[1];
  return CAT_SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
         CAT_SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

template <typename In>
struct Job {
  const In* x;              // shape (tokens, inputs)
  const In* blocks;         // shape (inputs / size, size, size), or null
  const int8_t* integers;   // the same, or null
  float unit;               // T of an entry of 1
  int64_t size;             // k; 1 without blocks
  int64_t interleave;
  int bits;
  bool symmetric;
  float clip_ratio;
  int8_t* q;             // shape (tokens, inputs)
  float* scales;         // shape (tokens)
  int32_t* zero_points;  // shape (tokens), or null
  int64_t tokens, inputs;

  bool has_blocks() const { return blocks || integers; }
};

// Multiply kTokens tokens by 16 / kTokens rows of a block.
template <typename In, int kTokens, typename Entry>
[[gnu::always_inline]] inline void multiply_rows(const Job<In>& job, const Entry* rows,
                                                 const In* x, float* z) {
  constexpr int kRows = kLanes / kTokens;
  using S = Step<In>;
  Floats sums[kLanes] = {};
  const auto add = [&](int64_t j, auto... count) {
    typename S::Operand tokens[kTokens];
#pragma GCC unroll 16
    for (int t = 0; t < kTokens; ++t) tokens[t] = S::get(x + t * job.inputs + j, count...);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const auto values = S::get(rows + r * job.size + j, count...);
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t)
        sums[t * kRows + r] = S::add(sums[t * kRows + r], values, tokens[t]);
    }
  };
  int64_t j = 0;
  for (; j + S::kInputs <= job.size; j += S::kInputs) add(j);
  if (j < job.size) add(j, job.size - j);
  const Floats found = add_lanes(sums) * job.unit;
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t)
    std::memcpy(z + t * job.inputs, reinterpret_cast<const float*>(&found) + t * kRows,
                kRows * sizeof(float));
}

template <int kTokens, typename In, typename Entry>
void multiply_tile(const Job<In>& job, const Entry* block, const In* x, float* z) {
  constexpr int64_t kRows = kLanes / kTokens;
  if (job.size >= kLanes) {  // for any number of tokens: the order of sums decides the bits
    for (int64_t i = 0; i < job.size; i += kRows) {
      const int64_t row = std::min(i, job.size - kRows);  // the last rows overlap
      multiply_rows<In, kTokens>(job, block + row * job.size, x, z + row);
    }
    return;
  }
  for (int t = 0; t < kTokens; ++t)
    for (int64_t i = 0; i < job.size; ++i) {
      float sum = 0;
      for (int64_t j = 0; j < job.size; ++j)
        sum += static_cast<float>(block[i * job.size + j]) *
               static_cast<float>(x[t * job.inputs + j]);
      z[t * job.inputs + i] = sum * job.unit;
    }
}

// Multiply tokens by a block.
template <typename In, typename Entry>
void multiply_tiles(const Job<In>& job, const Entry* block, const In* x, int64_t tokens,
                    float* z) {
  for (int64_t t = 0; t < tokens;) {
    const In* from = x + t * job.inputs;
    float* to = z + t * job.inputs;
    if (tokens - t >= 4) {
      multiply_tile<4>(job, block, from, to), t += 4;
    } else if (tokens - t >= 2) {
      multiply_tile<2>(job, block, from, to), t += 2;
    } else {
      multiply_tile<1>(job, block, from, to), t += 1;
    }
  }
}

// Integers of a block as floats, which hold them exactly.
template <typename In>
const In* convert(const int8_t* block, int64_t count, std::vector<In>& room) {
  room.resize(count);
  int64_t i = 0;
  using S = Step<In>;
  if constexpr (sizeof(typename S::Operand) == S::kInputs * sizeof(In)) {
    for (; i + S::kInputs <= count; i += S::kInputs) {
      const auto values = S::get(block + i);
      std::memcpy(static_cast<void*>(room.data() + i), &values, sizeof(values));
    }
  }
  for (; i + kLanes <= count; i += kLanes) store(room.data() + i, load(block + i));
  for (; i < count; ++i) room[i] = static_cast<In>(static_cast<float>(block[i]));
  return room.data();
}

constexpr int64_t kTokensOfConversion = 20;  // fewer are faster with integers as they are

// Multiply tokens from `first` to `last` by a block; z is the first of them.
template <typename In>
void multiply_block(const Job<In>& job, int64_t index, int64_t first, int64_t last, float* z,
                    std::vector<In>& room) {
  const int64_t channel = index * job.size, count = job.size * job.size;
  const In* x = job.x + first * job.inputs + channel;
  const int64_t tokens = last - first;
  if (!job.integers) {
    multiply_tiles(job, job.blocks + index * count, x, tokens, z + channel);
  } else if (tokens < kTokensOfConversion) {
    multiply_tiles(job, job.integers + index * count, x, tokens, z + channel);
  } else {
    const In* block = convert(job.integers + index * count, count, room);
    multiply_tiles(job, block, x, tokens, z + channel);
  }
}

template <typename In>
void copy_token(const Job<In>& job, int64_t token, float* z) {
  const In* x = job.x + token * job.inputs;
  int64_t i = 0;
  for (; i + kLanes <= job.inputs; i += kLanes) store(z + i, load(x + i));
  for (; i < job.inputs; ++i) z[i] = static_cast<float>(x[i]);
}

// ---- the Hadamard matrix -------------------------------------------------------------------

// A matrix H = M x S: M of an order, with the scale of H, and S of Sylvester's of the rest.
struct Hadamard {
  std::vector<float> matrix;
  int64_t order, sylvester;

  template <typename In>
  Hadamard(const In* entries, int64_t size)
      : matrix(entries, entries + size * size), order(size), sylvester(1) {
    while (order % 2 == 0 && halves()) {
      order /= 2, sylvester *= 2;
      for (int64_t i = 0; i < order; ++i)
        for (int64_t j = 0; j < order; ++j) matrix[i * order + j] = at(2 * order, 2 * i, 2 * j);
    }
  }

 private:
  float at(int64_t width, int64_t i, int64_t j) const { return matrix[i * width + j]; }

  // Whether each 2 x 2 of entries is a number times [[1, 1], [1, -1]]
  bool halves() const {
    for (int64_t i = 0; i < order; i += 2)
      for (int64_t j = 0; j < order; j += 2) {
        const float one = at(order, i, j);
        if (at(order, i, j + 1) != one || at(order, i + 1, j) != one ||
            at(order, i + 1, j + 1) != -one)
          return false;
      }
    return true;
  }
};

// Multiply by [[1, 1], [1, -1]], over values that are `stride` apart.
void add_and_subtract(int64_t stride, float* z) {
  float* y = z + stride;
  int64_t i = 0;
  for (; i + kLanes <= stride; i += kLanes) {
    const Floats a = load(z + i), b = load(y + i);
    store(z + i, a + b), store(y + i, a - b);
  }
  for (; i < stride; ++i) {
    const float a = z[i], b = y[i];
    z[i] = a + b, y[i] = a - b;
  }
}

// Multiply twice, over values that are `stride` and twice as far apart: one pass over memory.
void add_and_subtract_twice(int64_t stride, float* z) {
  if (stride % kLanes) {
    add_and_subtract(stride, z);
    add_and_subtract(stride, z + 2 * stride);
    return add_and_subtract(2 * stride, z);
  }
  for (int64_t i = 0; i < stride; i += kLanes) {
    float *p0 = z + i, *p1 = p0 + stride, *p2 = p1 + stride, *p3 = p2 + stride;
    const Floats a = load(p0), b = load(p1), c = load(p2), d = load(p3);
    const Floats ab = a + b, cd = c + d, a_b = a - b, c_d = c - d;
    store(p0, ab + cd), store(p1, a_b + c_d), store(p2, ab - cd), store(p3, a_b - c_d);
  }
}

// Multiply by M, over values that are `stride` apart.
void multiply_matrix(const Hadamard& h, int64_t stride, float* z, std::vector<float>& rows) {
  if (h.order == 1) {
    for (int64_t i = 0; i < stride; ++i) z[i] *= h.matrix[0];
    return;
  }
  constexpr int64_t kSums = 4;  // at a time, because one waits for its last product
  rows.resize(h.order * kLanes);
  for (int64_t i = 0; i < stride; i += kLanes) {
    const int64_t count = std::min<int64_t>(kLanes, stride - i);
    for (int64_t a = 0; a < h.order; ++a) {
      const float* from = z + a * stride + i;
      store(&rows[a * kLanes], count == kLanes ? load(from) : load(from, count));
    }
    for (int64_t a = 0; a < h.order; a += kSums) {
      const float* row[kSums];
      for (int64_t k = 0; k < kSums; ++k)
        row[k] = &h.matrix[std::min(a + k, h.order - 1) * h.order];
      Floats sums[kSums] = {};
      for (int64_t b = 0; b < h.order; ++b) {
        const Floats values = load(&rows[b * kLanes]);
#pragma GCC unroll 16
        for (int64_t k = 0; k < kSums; ++k)
          sums[k] = multiply_add(values, Floats{} + row[k][b], sums[k]);
      }
      for (int64_t k = 0; k < std::min(kSums, h.order - a); ++k)
        std::memcpy(z + (a + k) * stride + i, &sums[k], count * sizeof(float));
    }
  }
}

// Multiply a token by the matrix, over channels that are `interleave` apart.
void rotate(const Hadamard& h, int64_t interleave, int64_t inputs, float* z,
            std::vector<float>& rows) {
  const int64_t length = h.sylvester * interleave, span = h.order * length;
  int64_t stride = interleave;
  for (; 4 * stride <= length; stride *= 4)
    for (int64_t i = 0; i < inputs; i += 4 * stride) add_and_subtract_twice(stride, z + i);
  if (2 * stride <= length)
    for (int64_t i = 0; i < inputs; i += 2 * stride) add_and_subtract(stride, z + i);
  for (int64_t i = 0; i < inputs; i += span) multiply_matrix(h, length, z + i, rows);
}

// ---- integers ------------------------------------------------------------------------------

struct Range {
  float low, high;
  bool is_finite;
};

Range find_range(const float* z, int64_t count) {
  Floats low = {}, high = {}, zeros = {};  // 0 is always within the range
  const int64_t whole = count - count % kLanes;
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats v = i < whole ? load(z + i) : load(z + i, count - i);
    low = v < low ? v : low;
    high = v > high ? v : high;
    zeros += v * 0.f;  // NaN if a value is NaN or infinite
  }
  Range range{0, 0, true};
  for (int i = 0; i < kLanes; ++i) {
    range.low = std::min(range.low, low[i]);
    range.high = std::max(range.high, high[i]);
    range.is_finite = range.is_finite && zeros[i] == 0;
  }
  return range;
}

// How a token becomes integers.
struct Integers {
  float scale, zero, least, most;
};

// Round to integers and store them. 1.5 * 2^23 leaves no bits below 1: the sum with it is
// rounded to even as by `rint`, and its last byte is the integer.
inline void store_integers(const Integers& to, Floats z, int8_t* q, int64_t count) {
  Floats values = z / to.scale + to.zero;
  values = values < to.least ? Floats{} + to.least : values;
  values = values > to.most ? Floats{} + to.most : values;
  const Bytes bytes = last_bytes((Words)(values + 12582912.f));
  std::memcpy(q, &bytes, count);
}

// The expressions are those of cat_modifier/kernels/reference.py: the same bits.
template <typename In>
void quantize_token(const Job<In>& job, int64_t token, const float* z) {
  const float least = -(1 << (job.bits - 1)), most = (1 << (job.bits - 1)) - 1;
  const float tiny = std::numeric_limits<float>::min();
  auto [low, high, is_finite] = find_range(z, job.inputs);
  Integers to{.scale = 0, .zero = 0, .least = least, .most = most};
  if (job.symmetric) {
    to.scale = std::max(std::max(-low, high) / ((most - least) / 2), tiny);
  } else {
    low *= job.clip_ratio, high *= job.clip_ratio;
    to.scale = std::max((high - low) / (most - least), tiny);
    to.zero = std::rint(std::clamp(least - low / to.scale, least, most));
  }
  int8_t* q = job.q + token * job.inputs;
  if (is_finite) {
    const int64_t whole = job.inputs - job.inputs % kLanes;
    for (int64_t i = 0; i < whole; i += kLanes) store_integers(to, load(z + i), q + i, kLanes);
    if (const int64_t rest = job.inputs - whole)
      store_integers(to, load(z + whole, rest), q + whole, rest);
  } else {  // what follows is NaN as well
    std::fill_n(q, job.inputs, 0);
    to.scale = std::numeric_limits<float>::quiet_NaN(), to.zero = 0;
  }
  job.scales[token] = to.scale;
  if (job.zero_points) job.zero_points[token] = static_cast<int32_t>(to.zero);
}

// ---- all tokens ----------------------------------------------------------------------------

// Operations of some 15 microseconds. Less does not pay for waking another thread.
constexpr int64_t kWorkOfOneThread = 1 << 18;

constexpr int64_t kTokensOfOnePass = 32;  // over T

// Fewer tokens take as long, because T must be read
constexpr int64_t kTokensOfOneRead = 8;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename In>
void finish_token(const Job<In>& job, const std::optional<Hadamard>& hadamard, int64_t token,
                  float* z, std::vector<float>& rows) {
  if (!job.has_blocks()) copy_token(job, token, z);
  if (hadamard) rotate(*hadamard, job.interleave, job.inputs, z, rows);
  quantize_token(job, token, z);
}

template <typename In>
void run_few(const Job<In>& job, const std::optional<Hadamard>& hadamard) {
  std::vector<float> z(job.tokens * job.inputs);
  if (job.has_blocks()) {
    const int64_t tokens = std::max(job.tokens, kTokensOfOneRead);
    const int64_t work = divide_up(tokens * job.size * job.size, kLanes);
    torch::stable::parallel_for(0, job.inputs / job.size, divide_up(kWorkOfOneThread, work),
                                [&](int64_t begin, int64_t end) {
                                  std::vector<In> room;
                                  for (int64_t i = begin; i < end; ++i)
                                    multiply_block(job, i, 0, job.tokens, z.data(), room);
                                });
  }
  torch::stable::parallel_for(
      0, job.tokens, divide_up(kWorkOfOneThread, job.inputs), [&](int64_t begin, int64_t end) {
        std::vector<float> rows;
        for (int64_t t = begin; t < end; ++t)
          finish_token(job, hadamard, t, z.data() + t * job.inputs, rows);
      });
}

template <typename In>
void run_many(const Job<In>& job, const std::optional<Hadamard>& hadamard) {
  constexpr int64_t chunk = kTokensOfOnePass;
  torch::stable::parallel_for(0, job.tokens, chunk, [&](int64_t begin, int64_t end) {
    std::vector<float> z(chunk * job.inputs), rows;
    std::vector<In> room;
    for (int64_t first = begin; first < end; first += chunk) {
      const int64_t last = std::min(first + chunk, end);
      if (job.has_blocks())
        for (int64_t i = 0; i < job.inputs / job.size; ++i)
          multiply_block(job, i, first, last, z.data(), room);
      for (int64_t t = first; t < last; ++t)
        finish_token(job, hadamard, t, z.data() + (t - first) * job.inputs, rows);
    }
  });
}

// ---- the operator --------------------------------------------------------------------------

template <typename T>
const T* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "operands of the transform must be contiguous");
  return static_cast<const T*>(tensor.data_ptr());
}

struct Arguments {
  Tensor x;
  std::optional<Tensor> blocks, hadamard;
  int64_t interleave, bits;
  bool symmetric;
  std::optional<Tensor> clip_ratio;
};

template <typename In>
void run(const Arguments& a, Tensor& q, Tensor& scales, Tensor& zero_points) {
  std::optional<Hadamard> hadamard;
  if (a.hadamard) hadamard.emplace(data<In>(*a.hadamard), a.hadamard->size(0));
  const bool is_integer = a.blocks && a.blocks->scalar_type() == ScalarType::Char;
  const Job<In> job{.x = data<In>(a.x),
                    .blocks = a.blocks && !is_integer ? data<In>(*a.blocks) : nullptr,
                    .integers = is_integer ? data<int8_t>(*a.blocks) : nullptr,
                    .unit = is_integer ? 1.f / 1024 : 1.f,
                    .size = a.blocks ? a.blocks->size(1) : 1,
                    .interleave = a.interleave,
                    .bits = static_cast<int>(a.bits),
                    .symmetric = a.symmetric,
                    .clip_ratio = a.clip_ratio ? *data<float>(*a.clip_ratio) : 1.f,
                    .q = static_cast<int8_t*>(q.data_ptr()),
                    .scales = static_cast<float*>(scales.data_ptr()),
                    .zero_points =
                        a.symmetric ? nullptr : static_cast<int32_t*>(zero_points.data_ptr()),
                    .tokens = a.x.size(0),
                    .inputs = a.x.size(1)};
  if (job.tokens == 0) return;
  if (job.tokens <= kTokensOfOnePass)
    run_few(job, hadamard);
  else
    run_many(job, hadamard);
}

std::tuple<Tensor, Tensor, Tensor> transform_quantize(Tensor x, std::optional<Tensor> blocks,
                                                      std::optional<Tensor> hadamard,
                                                      int64_t interleave, int64_t bits,
                                                      bool symmetric,
                                                      std::optional<Tensor> clip_ratio) {
  STD_TORCH_CHECK(x.dim() == 2, "x is not a matrix");
  const int64_t tokens = x.size(0), inputs = x.size(1);
  STD_TORCH_CHECK(inputs > 0, "x has no channels");
  STD_TORCH_CHECK(bits >= 2 && bits <= 8, "integers have 2 to 8 bits");
  STD_TORCH_CHECK(interleave >= 1, "interleave is not positive");
  if (blocks) {
    STD_TORCH_CHECK(blocks->scalar_type() == ScalarType::Char ||
                        blocks->scalar_type() == x.scalar_type(),
                    "blocks are neither int8 nor of the dtype of x");
    STD_TORCH_CHECK(blocks->dim() == 3 && blocks->size(1) == blocks->size(2) &&
                        blocks->size(0) * blocks->size(1) == inputs,
                    "blocks and x differ");
  }
  if (hadamard) {
    STD_TORCH_CHECK(hadamard->scalar_type() == x.scalar_type(), "matrix and x differ in dtype");
    STD_TORCH_CHECK(hadamard->dim() == 2 && hadamard->size(0) == hadamard->size(1) &&
                        hadamard->size(0) > 0 && inputs % (hadamard->size(0) * interleave) == 0,
                    "matrix and x differ");
  }
  if (clip_ratio)
    STD_TORCH_CHECK(clip_ratio->scalar_type() == ScalarType::Float && clip_ratio->numel() == 1,
                    "clip_ratio is not one float32");
  Tensor q = torch::stable::new_empty(x, {tokens, inputs}, ScalarType::Char);
  Tensor scales = torch::stable::new_empty(x, {tokens, 1}, ScalarType::Float);
  Tensor zero_points =
      torch::stable::new_empty(x, {symmetric ? 0 : tokens, 1}, ScalarType::Int);
  const Arguments arguments{x, blocks, hadamard, interleave, bits, symmetric, clip_ratio};
  switch (x.scalar_type()) {
    case ScalarType::Float:
      run<float>(arguments, q, scales, zero_points);
      break;
    case ScalarType::BFloat16:
      run<BFloat16>(arguments, q, scales, zero_points);
      break;
    case ScalarType::Half:
      run<Half>(arguments, q, scales, zero_points);
      break;
    default:
      STD_TORCH_CHECK(false, "inputs are float32, bfloat16 or float16");
  }
  return {q, scales, zero_points};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAT_LIBRARY, CPU, library) {
  library.impl("transform_quantize_cpu", TORCH_BOX(&transform_quantize));
}
