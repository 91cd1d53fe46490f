// Products of small tiles in registers, and the exponential: what the CPU kernels are made of.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace llmkit {

constexpr int LANES = 16;
typedef float vec __attribute__((vector_size(64)));
typedef int32_t ivec __attribute__((vector_size(64)));

static inline vec load(const float* p) { vec v; std::memcpy(&v, p, sizeof v); return v; }
static inline void store(float* p, vec v) { std::memcpy(p, &v, sizeof v); }
// Spelt out: `vec{} + x` is an addition, which takes a multiplier's place in the loop of `tile`.
static inline vec all(float x) { return vec{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
static inline float sum(vec v) { float s = 0; for (int i = 0; i < LANES; i++) s += v[i]; return s; }
static inline float most(vec v) { float m = v[0]; for (int i = 1; i < LANES; i++) m = std::max(m, v[i]); return m; }

// e^x to 2 units in the last place; 0 below -87, and e^88 from there on.
static inline vec exp(vec x) {
  const vec low = all(-87.0f), high = all(88.0f), magic = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to a whole number
  const ivec tiny = x < low;
  x = tiny ? low : x > high ? high : x;
  const vec n = (x * 1.44269504088896341f + magic) - magic;
  const vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec p = all(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const ivec power = (__builtin_convertvector(n, ivec) + 127) << 23;
  vec two;
  std::memcpy(&two, &power, sizeof two);
  const vec y = p * two;
  return tiny ? vec{} : y;
}

// C (M x 16 NV) = or += A B, where A[i, p] lies at a[i * ai + p * ap] and the rows of B and C are ldb and ldc apart.
template <int M, int NV>
static inline void tile(const float* a, long ai, long ap, const float* b, long ldb, float* c, long ldc, long depth,
                        bool add) {
  vec acc[M][NV];
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) acc[i][j] = add ? load(c + i * ldc + j * LANES) : vec{};
  for (long p = 0; p < depth; p++) {
    vec row[NV];
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) row[j] = load(b + p * ldb + j * LANES);
#pragma GCC unroll 16
    for (int i = 0; i < M; i++) {
      const vec x = all(a[i * ai + p * ap]);
#pragma GCC unroll 16
      for (int j = 0; j < NV; j++) acc[i][j] += x * row[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < M; i++)
#pragma GCC unroll 16
    for (int j = 0; j < NV; j++) store(c + i * ldc + j * LANES, acc[i][j]);
}

template <int NV>
static inline void rows(long m, const float* a, long ai, long ap, const float* b, long ldb, float* c, long ldc,
                        long depth, bool add) {
  long i = 0;
  for (; i + 6 <= m; i += 6) tile<6, NV>(a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, depth, add);
  for (; i + 2 <= m; i += 2) tile<2, NV>(a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, depth, add);
  for (; i < m; i++) tile<1, NV>(a + i * ai, ai, ap, b, ldb, c + i * ldc, ldc, depth, add);
}

// The same for any M and any N that is a multiple of 16.
static inline void product(long m, long n, long depth, const float* a, long ai, long ap, const float* b, long ldb,
                           float* c, long ldc, bool add) {
  long j = 0;
  for (; j + 64 <= n; j += 64) rows<4>(m, a, ai, ap, b + j, ldb, c + j, ldc, depth, add);
  for (; j < n; j += LANES) rows<1>(m, a, ai, ap, b + j, ldb, c + j, ldc, depth, add);
}

}  // namespace llmkit
