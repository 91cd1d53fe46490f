// Numbers as a cache keeps them (fp32, bf16, fp16, or whole numbers with a factor), read 16 at a time.
#pragma once
#include <cmath>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "tile.h"

namespace llmkit {

typedef uint32_t uvec __attribute__((vector_size(64)));
typedef uint16_t hvec __attribute__((vector_size(32)));
typedef int8_t bvec __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
struct fp16 { uint16_t bits; };

static inline uvec bits(vec x) { uvec u; std::memcpy(&u, &x, sizeof u); return u; }
static inline vec number(uvec u) { vec x; std::memcpy(&x, &u, sizeof x); return x; }
static inline uvec halves(const void* p) { hvec h; std::memcpy(&h, p, sizeof h); return __builtin_convertvector(h, uvec); }

static inline vec wide(const float* p) { return load(p); }
static inline vec wide(const bf16* p) { return number(halves(p) << 16); }
static inline vec wide(const fp16* p) {
  const uvec h = halves(p), size = h & 0x7fff, sign = (h & 0x8000) << 16;
  const uvec finite = bits(number(size << 13) * 0x1p112f), endless = (size << 13) | 0x7f800000u;
  return number((size >= 0x7c00 ? endless : finite) | sign);
}
static inline vec wide(const int8_t* p) {
#ifdef __AVX512F__  // the compiler's own conversion goes number by number
  return (vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  bvec b;
  std::memcpy(&b, p, sizeof b);
  return __builtin_convertvector(__builtin_convertvector(b, ivec), vec);
#endif
}

// Writes n numbers `step` apart; those that are kept as whole numbers have one factor, which goes to `by`.
template <class T>
static inline void put(const T* from, long n, T* to, long step, float*) { for (long d = 0; d < n; d++) to[d * step] = from[d]; }

static inline void put(const float* from, long n, int8_t* to, long step, float* by) {
  float most = 0;
  bool finite = true;
  for (long d = 0; d < n; d++) {
    most = std::max(most, std::fabs(from[d]));
    finite &= std::fabs(from[d]) <= 3.4e38f;
  }
  *by = finite ? most / 127 : NAN;  // what is not a number is not hidden
  for (long d = 0; d < n; d++)
    to[d * step] = finite && most > 0 ? static_cast<int8_t>(std::max(-127.0f, std::min(127.0f, std::nearbyint(from[d] / *by)))) : 0;
}

}  // namespace llmkit
