// The gate of a gated MLP (SwiGLU, arXiv 2002.05202), fp32: silu(gate) * up in one pass each way.
#include "../gate.h"

using namespace llmkit;

namespace {

constexpr int64_t SMALL = 16384;  // floats that are not worth another thread

// The last, shorter piece goes through a vector of its own.
template <typename Work>
void each(int64_t count, int threads, Work work) {
  const int64_t whole = count / LANES * LANES;
#pragma omp parallel for schedule(static) num_threads(threads) if (count > SMALL)
  for (int64_t i = 0; i < whole; i += LANES) work(i, LANES);
  if (whole < count) work(whole, count - whole);
}

}  // namespace

extern "C" {

void gated_forward(const float* gate, const float* up, float* out, int64_t count, int threads) {
  each(count, threads, [=](int64_t i, int64_t n) {
    put(out + i, silu(some(gate + i, n)) * some(up + i, n), n);
  });
}

void gated_backward(const float* gate, const float* up, const float* grad, float* dgate, float* dup, int64_t count,
                    int threads) {
  each(count, threads, [=](int64_t i, int64_t n) {
    const vec x = some(gate + i, n), g = some(grad + i, n), s = sigmoid(x), silu = x * s;
    put(dup + i, g * silu, n);
    put(dgate + i, g * some(up + i, n) * (s + silu * (1.0f - s)), n);
  });
}
}
