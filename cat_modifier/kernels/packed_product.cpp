// SPDX-License-Identifier: Apache-2.0
//
// Product of int8 activations and 4-bit weights, for CPUs. Exact sums in int32.
//
// Weights lie in memory in the order in which they are read. A panel has 32 output channels, a
// line 8 input channels of a panel in 128 bytes. Byte 4 r + i of line l holds, each plus 8,
//
//     low half:  weight of output channel r, input channel 8 l + i
//     high half: weight of output channel r, input channel 8 l + 4 + i      (i = 0..3)
//
// so that a mask and a shift make operands of `vpdpbusd`: 16 channels times 4 products each.
// Zeros fill up the last panel and the last line. Sums over the inputs take the 8 off again.
//
// Weights are unpacked in registers, for a tile of tokens at a time. All tiles of a block of
// tokens multiply one panel, which is in the cache, before the next.
//
// The compiler chooses the instructions, by the CPU for which it is asked to compile:
// AVX512-VNNI, AVX-VNNI, AVX2, or plain loops. CAT_PLAIN_LOOPS asks for the last.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <vector>

#if defined(__AVX2__) && !defined(CAT_PLAIN_LOOPS)
#include <immintrin.h>
#endif

#ifndef CAT_LIBRARY
#define CAT_LIBRARY cat_modifier
#endif

namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kVectorRows = 16;  // output channels of a vector
constexpr int kVectorBytes = 4 * kVectorRows;
constexpr int kPanelVectors = 2;
constexpr int kPanelRows = kPanelVectors * kVectorRows;
constexpr int kLineInputs = 8;
constexpr int kLineBytes = kPanelVectors * kVectorBytes;

// ---- instructions ------------------------------------------------------------------------
//
// Bytes: 4 weights plus 8, of 16 channels. Sums: int32 of 16 channels. Inputs: 4 activations,
// once for each channel. The sums of kTileTokens x kTileVectors stay in registers.

#if defined(__AVX512VNNI__) && !defined(CAT_PLAIN_LOOPS)

constexpr int kTileTokens = 12, kTileVectors = 2;
using Bytes = __m512i;
using Sums = __m512i;
using Inputs = __m512i;

inline Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline void store(uint8_t* p, Bytes b) { _mm512_storeu_si512(p, b); }
inline void store(int32_t* p, Sums s) { _mm512_storeu_si512(p, s); }
inline Bytes low(Bytes b) { return _mm512_and_si512(b, _mm512_set1_epi8(15)); }
inline Bytes high(Bytes b) { return low(_mm512_srli_epi16(b, 4)); }
inline Inputs repeat(int32_t x) { return _mm512_set1_epi32(x); }
inline Sums add_products(Sums s, Bytes w, Inputs x) { return _mm512_dpbusd_epi32(s, w, x); }

#elif defined(__AVX2__) && !defined(CAT_PLAIN_LOOPS)

constexpr int kTileTokens = 6, kTileVectors = 1;
struct Pair {
  __m256i first, second;
};
using Bytes = Pair;
using Sums = Pair;
using Inputs = __m256i;

inline void store_pair(void* p, Pair pair) {
  auto to = static_cast<__m256i*>(p);
  _mm256_storeu_si256(to, pair.first);
  _mm256_storeu_si256(to + 1, pair.second);
}
inline Bytes load(const uint8_t* p) {
  auto from = reinterpret_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline void store(uint8_t* p, Bytes b) { store_pair(p, b); }
inline void store(int32_t* p, Sums s) { store_pair(p, s); }
inline Bytes low(Bytes b) {
  const __m256i mask = _mm256_set1_epi8(15);
  return {_mm256_and_si256(b.first, mask), _mm256_and_si256(b.second, mask)};
}
inline Bytes high(Bytes b) {
  return low({_mm256_srli_epi16(b.first, 4), _mm256_srli_epi16(b.second, 4)});
}
inline Inputs repeat(int32_t x) { return _mm256_set1_epi32(x); }
inline __m256i add_products(__m256i s, __m256i w, __m256i x) {
#if defined(__AVXVNNI__)
  return _mm256_dpbusd_avx_epi32(s, w, x);
#else
  // sums of two products stay within 2 * 15 * 128, far below 2^15
  const __m256i twos = _mm256_maddubs_epi16(w, x);
  return _mm256_add_epi32(s, _mm256_madd_epi16(twos, _mm256_set1_epi16(1)));
#endif
}
inline Sums add_products(Sums s, Bytes w, Inputs x) {
  return {add_products(s.first, w.first, x), add_products(s.second, w.second, x)};
}

#else

constexpr int kTileTokens = 6, kTileVectors = 1;
struct Bytes {
  uint8_t of[kVectorBytes];
};
struct Sums {
  int32_t of[kVectorRows];
};
struct Inputs {
  int8_t of[4];
};

inline Bytes load(const uint8_t* p) {
  Bytes b;
  std::memcpy(&b, p, sizeof(b));
  return b;
}
inline void store(uint8_t* p, const Bytes& b) { std::memcpy(p, &b, sizeof(b)); }
inline void store(int32_t* p, const Sums& s) { std::memcpy(p, &s, sizeof(s)); }
inline Bytes low(Bytes b) {
  for (uint8_t& one : b.of) one &= 15;
  return b;
}
inline Bytes high(Bytes b) {
  for (uint8_t& one : b.of) one >>= 4;
  return b;
}
inline Inputs repeat(int32_t x) {
  Inputs four;
  std::memcpy(&four, &x, sizeof(four));
  return four;
}
inline Sums add_products(Sums s, const Bytes& w, const Inputs& x) {
  for (int row = 0; row < kVectorRows; ++row)
    for (int i = 0; i < 4; ++i) s.of[row] += w.of[4 * row + i] * x.of[i];
  return s;
}

#endif

// ---- sums of products --------------------------------------------------------------------

// What a tile multiplies: some tokens by the channels of a panel.
struct Operands {
  const uint8_t* weight;
  const int8_t* x;  // shape (tokens, 8 lines)
  int64_t lines;
  int64_t ahead;  // bytes from a line to the one to load into the cache; 0 for none
  int32_t* sums;  // shape (tokens, kPanelRows)
};

// All loops over tokens and vectors are unrolled: the sums must be registers.
template <int kTokens>
void multiply(const Operands& o) {
  Sums sums[kTokens][kTileVectors] = {};
  for (int64_t line = 0; line < o.lines; ++line) {
    const uint8_t* weight = o.weight + line * kLineBytes;
    if (o.ahead) {
#pragma GCC unroll 16
      for (int v = 0; v < kPanelVectors; ++v)
        __builtin_prefetch(weight + o.ahead + v * kVectorBytes);
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      Bytes w[kTileVectors];
#pragma GCC unroll 16
      for (int v = 0; v < kTileVectors; ++v) {
        const Bytes both = load(weight + v * kVectorBytes);
        w[v] = half == 0 ? low(both) : high(both);
      }
#pragma GCC unroll 16
      for (int t = 0; t < kTokens; ++t) {
        int32_t four;
        std::memcpy(&four, o.x + (t * o.lines + line) * kLineInputs + 4 * half, 4);
        const Inputs x = repeat(four);
#pragma GCC unroll 16
        for (int v = 0; v < kTileVectors; ++v) sums[t][v] = add_products(sums[t][v], w[v], x);
      }
    }
  }
#pragma GCC unroll 16
  for (int t = 0; t < kTokens; ++t)
#pragma GCC unroll 16
    for (int v = 0; v < kTileVectors; ++v)
      store(o.sums + t * kPanelRows + v * kVectorRows, sums[t][v]);
}

// Multiply a panel by `tokens` tokens, at most kTokens.
template <int kTokens = kTileTokens>
void multiply_tile(int tokens, Operands o) {
  if constexpr (kTokens > 1)
    if (tokens < kTokens) return multiply_tile<kTokens - 1>(tokens, o);
  for (int v = 0; v < kPanelVectors; v += kTileVectors) {
    multiply<kTokens>(o);
    o.weight += kTileVectors * kVectorBytes;
    o.sums += kTileVectors * kVectorRows;
    o.ahead = 0;
  }
}

// ---- from sums to outputs ----------------------------------------------------------------

template <typename Out>
struct Product {
  const int8_t* x;            // shape (tokens, 8 lines)
  const int32_t* offset;      // 8 times the sums over the inputs of x, shape (tokens)
  const float* scale;         // shape (tokens)
  const int32_t* zero_point;  // shape (tokens), or null
  const uint8_t* weight;      // shape (panels, lines, kLineBytes)
  const float* weight_scale;  // shape (rows)
  const float* correction;    // of the zero points, shape (rows), or null
  const Out* bias;            // shape (rows), or null
  Out* out;                   // shape (tokens, rows)
  int64_t tokens, rows, lines;
};

template <typename Out>
void round_to(const float* y, int count, Out* out) {
  for (int i = 0; i < count; ++i) out[i] = static_cast<Out>(y[i]);
}

#if defined(__F16C__) && !defined(CAT_PLAIN_LOOPS)
// compilers do not vectorize this conversion
void round_to(const float* y, int count, Half* out) {
  int i = 0;
  for (; i + 8 <= count; i += 8)
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i),
                     _mm256_cvtps_ph(_mm256_loadu_ps(y + i), _MM_FROUND_TO_NEAREST_INT));
  for (; i < count; ++i) out[i] = static_cast<Half>(y[i]);
}
#endif

// The order of operations, and which are fused, are those of vLLM's product with oneDNN: both
// return the same bits.
template <typename Out>
[[gnu::always_inline]] inline void finish(const Product<Out>& p, int64_t token, int64_t row,
                                          int rows, const int32_t* sums) {
  const int32_t offset = p.offset[token];
  const float scale = p.scale[token];
  float y[kPanelRows], added[kPanelRows] = {};
  for (int i = 0; i < rows; ++i)
    y[i] = static_cast<float>(sums[i] - offset) * p.weight_scale[row + i];
  if (p.bias)
    for (int i = 0; i < rows; ++i) added[i] = static_cast<float>(p.bias[row + i]);
  if (p.zero_point) {
    const float zero = scale * static_cast<float>(p.zero_point[token]);
    for (int i = 0; i < rows; ++i)
      y[i] = std::fma(y[i], scale, -(p.correction[row + i] * zero)) + added[i];
  } else {
    for (int i = 0; i < rows; ++i) y[i] = std::fma(y[i], scale, added[i]);
  }
  round_to(y, rows, p.out + token * p.rows + row);
}

template <typename Out>
void finish_tile(const Product<Out>& p, int64_t panel, int64_t token, int tokens,
                 const int32_t* sums) {
  const int64_t row = panel * kPanelRows;
  const int rows = std::min<int64_t>(kPanelRows, p.rows - row);
  for (int t = 0; t < tokens; ++t, sums += kPanelRows)
    if (rows == kPanelRows)  // loops of known length are faster
      finish(p, token + t, row, kPanelRows, sums);
    else
      finish(p, token + t, row, rows, sums);
}

// ---- all tokens and channels -------------------------------------------------------------

constexpr int64_t kBlockBytes = 1 << 20;  // activations of a block, which stay in the cache
constexpr int64_t kAhead = 8192;          // bytes

// Multiply-adds of some 15 microseconds. Less does not pay for waking another thread.
constexpr int64_t kWorkOfOneThread = 1 << 23;

// Fewer tokens take as long, because weights must be read
constexpr int64_t kTokensOfOneRead = 8;

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Part `i` of `parts` of nearly equal size
inline int64_t start(int64_t total, int64_t parts, int64_t i) { return total * i / parts; }

// Multiply tokens from `first` to `last` by a panel.
template <typename Out>
void multiply_panel(const Product<Out>& p, int64_t panel, int64_t first, int64_t last) {
  alignas(64) int32_t sums[kTileTokens * kPanelRows];
  const int64_t panel_bytes = p.lines * kLineBytes;
  const int64_t tokens = last - first, tiles = divide_up(tokens, kTileTokens);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t token = first + start(tokens, tiles, tile);
    const int count = first + start(tokens, tiles, tile + 1) - token;
    // the last of several tiles, which read the panel from the cache, loads the next panel
    const int64_t ahead = tiles == 1 ? kAhead : tile == tiles - 1 ? panel_bytes : 0;
    multiply_tile(count, {.weight = p.weight + panel * panel_bytes,
                          .x = p.x + token * p.lines * kLineInputs,
                          .lines = p.lines,
                          .ahead = ahead,
                          .sums = sums});
    finish_tile(p, panel, token, count, sums);
  }
}

template <typename Out>
void multiply_all(const Product<Out>& p) {
  const int64_t inputs = p.lines * kLineInputs;
  const int64_t panels = divide_up(p.rows, kPanelRows);
  const int64_t blocks = divide_up(p.tokens * inputs, kBlockBytes);
  if (blocks == 0) return;
  const int64_t block_tokens = std::max(p.tokens / blocks, kTokensOfOneRead);
  const int64_t grain = divide_up(kWorkOfOneThread, kPanelRows * inputs * block_tokens);
  torch::stable::parallel_for(0, blocks * panels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t block = i / panels;
      multiply_panel(p, i % panels, start(p.tokens, blocks, block),
                     start(p.tokens, blocks, block + 1));
    }
  });
}

// ---- the operator ------------------------------------------------------------------------

// Copy tokens into rows of whole lines, filled up with zeros.
std::vector<int8_t> pad(const int8_t* x, int64_t tokens, int64_t inputs, int64_t padded) {
  std::vector<int8_t> result(tokens * padded);
  for (int64_t t = 0; t < tokens; ++t)
    std::copy_n(x + t * inputs, inputs, result.data() + t * padded);
  return result;
}

std::vector<int32_t> offsets(const int8_t* x, int64_t tokens, int64_t inputs) {
  std::vector<int32_t> result(tokens);
  const int64_t grain = divide_up(1 << 18, std::max<int64_t>(inputs, 1));
  torch::stable::parallel_for(0, tokens, grain, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; ++t) {
      int32_t sum = 0;
      for (int64_t i = 0; i < inputs; ++i) sum += x[t * inputs + i];
      result[t] = 8 * sum;
    }
  });
  return result;
}

template <typename T>
const T* data(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "operands of the product must be contiguous");
  return static_cast<const T*>(tensor.data_ptr());
}

template <typename T>
const T* data(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

struct Arguments {
  Tensor x, scale;
  std::optional<Tensor> zero_point;
  Tensor weight, weight_scale;
  std::optional<Tensor> correction, bias;
};

template <typename Out>
void multiply_arguments(const Arguments& a, Tensor& out) {
  const int64_t tokens = a.x.size(0), inputs = a.x.size(1), lines = a.weight.size(1);
  const int64_t padded = lines * kLineInputs;
  const int8_t* x = data<int8_t>(a.x);
  std::vector<int8_t> copy;
  if (padded != inputs) {
    copy = pad(x, tokens, inputs, padded);
    x = copy.data();
  }
  const std::vector<int32_t> offset = offsets(x, tokens, padded);
  multiply_all<Out>({.x = x,
                     .offset = offset.data(),
                     .scale = data<float>(a.scale),
                     .zero_point = data<int32_t>(a.zero_point),
                     .weight = data<uint8_t>(a.weight),
                     .weight_scale = data<float>(a.weight_scale),
                     .correction = data<float>(a.correction),
                     .bias = data<Out>(a.bias),
                     .out = static_cast<Out*>(out.data_ptr()),
                     .tokens = tokens,
                     .rows = a.weight_scale.numel(),
                     .lines = lines});
}

Tensor packed_product(Tensor x, Tensor scale, std::optional<Tensor> zero_point, Tensor weight,
                      Tensor weight_scale, std::optional<Tensor> correction,
                      std::optional<Tensor> bias, ScalarType dtype) {
  const int64_t rows = weight_scale.numel();
  STD_TORCH_CHECK(weight.size(0) == divide_up(rows, kPanelRows), "weight and its scale differ");
  STD_TORCH_CHECK(weight.size(1) == divide_up(x.size(1), kLineInputs), "weight and x differ");
  STD_TORCH_CHECK(!bias || bias->scalar_type() == dtype, "bias and output differ in dtype");
  Tensor out = torch::stable::new_empty(x, {x.size(0), rows}, dtype);
  const Arguments arguments{x, scale, zero_point, weight, weight_scale, correction, bias};
  switch (dtype) {
    case ScalarType::Float:
      multiply_arguments<float>(arguments, out);
      break;
    case ScalarType::BFloat16:
      multiply_arguments<BFloat16>(arguments, out);
      break;
    case ScalarType::Half:
      multiply_arguments<Half>(arguments, out);
      break;
    default:
      STD_TORCH_CHECK(false, "the product returns float32, bfloat16 or float16");
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CAT_LIBRARY, CPU, library) {
  library.impl("packed_product", TORCH_BOX(&packed_product));
}
