// One row of a chunk: scores become weights, and what chunks give is merged in turn.
#pragma once
#include <cmath>

#include "../stored.h"

namespace llmkit {
namespace {

constexpr float NONE = -1e30f;

inline vec tanh(vec x) {  // to 2 units in the last place (the polynomial is that of Cephes)
  const vec z = x * x, size = x < 0.0f ? -x : x;
  vec p = all(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  const vec near = p * z * x + x, far = 1.0f - 2.0f / (exp(size + size) + 1.0f);
  return size < 0.625f ? near : x < 0.0f ? -far : far;
}

__attribute__((noinline)) void capped(float* row, long lanes, float cap) {
  for (long l = 0; l < lanes; l += LANES) store(row + l, tanh(load(row + l) / cap) * cap);
}

__attribute__((noinline)) void times(float* row, long lanes, const float* by) {
  for (long l = 0; l < lanes; l += LANES) store(row + l, load(row + l) * load(by + l));
}

struct Mass { float high, sum; };

// Scores -> weights, and what they are relative to.
__attribute__((noinline)) Mass softened(float* row, long lanes) {
  vec m = all(NONE);
  for (long l = 0; l < lanes; l += LANES) { const vec x = load(row + l); m = x > m ? x : m; }
  const float high = most(m), base = high <= NONE ? 0.0f : high;
  vec total{};
  for (long l = 0; l < lanes; l += LANES) { const vec x = exp(load(row + l) - base); store(row + l, x); total += x; }
  return {high, sum(total)};
}

// Adds a chunk to what there is; one of which a query sees nothing changes no bit.
__attribute__((noinline)) void merge(Mass& there, float* out, const Mass& chunk, const float* part, long columns) {
  const float high = std::max(there.high, chunk.high);
  const float keep = std::exp(there.high - high), take = chunk.high <= NONE ? 0.0f : std::exp(chunk.high - high);
  there = {high, std::fma(chunk.sum, take, there.sum * keep)};
  for (long d = 0; d < columns; d += LANES) store(out + d, load(part + d) * take + load(out + d) * keep);
}

}  // namespace
}  // namespace llmkit
