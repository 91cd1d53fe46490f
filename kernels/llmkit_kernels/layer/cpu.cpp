// A layer of a transformer, fp32: what other libraries compute, one after the other, in one call and one room.
//
// It has no products of its own, and so no order of sums: each is made by the very function that makes it elsewhere.
#include <algorithm>
#include <cstdint>

namespace {

typedef void Forward(const float*, const float* const*, const float* const*, const int64_t*, int64_t, float*, float*,
                     const void*, float*, int64_t, int64_t, int64_t, int64_t, int);
typedef void Gated(const float*, const float*, const float*, const float*, const float*, float*, float*, float*,
                   const void*, float*, int64_t, int64_t, int64_t, int64_t, int);
typedef void Normed(const float*, const float*, float*, float*, int64_t, int64_t, float, int);
typedef void Attend(const float*, const void*, const void*, const int64_t*, float*, void*, void*, float*, float*,
                    const int64_t*, const int64_t*, const int64_t*, const uint64_t*, const int64_t*, const int64_t*,
                    const float*, const float*, const float*, float*, int64_t, int64_t, int64_t, int64_t, int64_t,
                    int64_t, int64_t, int64_t, int64_t, int64_t, float, float, int);

struct Calls {
  Forward* forward;
  Gated* gated;
  int64_t (*across)(int64_t rows);
  Normed* normed;
  Attend* attend;
  int64_t (*room)(int64_t groups, int64_t size, int64_t value, int64_t block, int64_t queries);
};

// Linears of one input, as linear/cpu.cpp has them.
struct Linears {
  const float *const *weights, *const *biases;
  const int64_t* outs;
  const void* lows;
  int64_t count, in, width, ranks;
};

struct Norm {
  const float* weight;  // null: there is none
  float eps;
};

struct Layer {
  Linears inner, out, both, down;
  Norm before, after, query, key;
  int64_t heads, held, size, window;
  float scale, cap;
};

// Where the step's keys lie: a layer's blocks, then what paged/laid.py made of the spans.
struct Step {
  void *keys, *values;
  float *by_key, *by_value;
  const int64_t *slots, *spans, *table;
  const uint64_t* seen;
  const int64_t *depths, *tasks;
  const float *cos, *sin;
  int64_t rows, count, block, queries, precision;
};

constexpr int64_t ROUND = 16;  // floats to which parts of the room are rounded up: each begins with a whole vector

int64_t rounded(int64_t floats) { return (floats + ROUND - 1) / ROUND * ROUND; }

// Parts of the room, which the two halves of a layer use one after the other.
struct Room {
  int64_t row, wide, linear, heads;

  Room(const Calls& c, const Layer& l, const Step& s, int threads) {
    row = rounded(s.rows * l.inner.in);
    wide = rounded(s.rows * std::max(l.inner.width + l.out.in, l.both.width));
    linear = 0;
    for (const Linears* one : {&l.inner, &l.out, &l.both, &l.down})
      linear = std::max(linear, one->in * c.across(s.rows) + one->ranks * (s.rows + c.across(s.rows)));
    linear = rounded(linear);
    heads = threads * c.room(l.heads / l.held, l.size, l.size, s.block, s.queries);
  }

  int64_t floats() const { return 2 * row + wide + std::max(linear, heads); }
};

void forward(const Calls& c, const Linears& of, const float* x, float* y, float* room, int64_t rows, int threads) {
  c.forward(x, of.weights, of.biases, of.outs, of.count, y, room, of.lows, room + of.in * c.across(rows), rows, of.in,
            of.width, of.in, threads);
}

void add(float* y, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i++) y[i] += x[i];
}

// A norm over each head of each row, in its place.
void over_heads(const Calls& c, const Norm& norm, float* x, int64_t step, int64_t rows, int64_t heads, int64_t size) {
  for (int64_t r = 0; norm.weight && r < rows; r++)
    c.normed(x + r * step, norm.weight, x + r * step, nullptr, heads, size, norm.eps, 1);
}

}  // namespace

extern "C" {

// Floats that the other works in.
int64_t layer_room(const Calls* calls, const Layer* layer, const Step* step, int threads) {
  return Room(*calls, *layer, *step, threads).floats();
}

// y (rows, hidden) = h + down(silu(gate(n(h))) * up(n(h))), with h = x + out(attention(n(x))).
void layer_forward(const Calls* calls, const Layer* layer, const Step* step, const float* x, float* y, float* room,
                   int threads) {
  const Calls& c = *calls;
  const Layer& l = *layer;
  const Step& s = *step;
  const Room of(c, l, s, threads);
  const int64_t hidden = l.inner.in, width = l.inner.width, rows = s.rows;
  float *normed = room, *mid = normed + of.row, *wide = mid + of.row, *work = wide + of.wide;
  c.normed(x, l.before.weight, normed, nullptr, rows, hidden, l.before.eps, threads);
  forward(c, l.inner, normed, wide, work, rows, threads);
  float *k = wide + l.heads * l.size, *v = k + l.held * l.size, *out = wide + rows * width;
  over_heads(c, l.query, wide, width, rows, l.heads, l.size);
  over_heads(c, l.key, k, width, rows, l.held, l.size);
  const int64_t strides[] = {l.size, width, l.size, width, l.size, width};
  c.attend(wide, k, v, strides, out, s.keys, s.values, s.by_key, s.by_value, s.slots, s.spans, s.table, s.seen, s.depths,
           s.tasks, nullptr, s.cos, s.sin, work, rows, s.count, l.heads, l.heads / l.held, l.size, l.size, s.block,
           s.queries, l.window, s.precision, l.scale, l.cap, threads);
  forward(c, l.out, out, mid, work, rows, threads);
  add(mid, x, rows * hidden);
  c.normed(mid, l.after.weight, normed, nullptr, rows, hidden, l.after.eps, threads);
  const int64_t inner = l.down.in;
  c.gated(normed, l.both.weights[0], l.both.biases[0], l.both.weights[1], l.both.biases[1], wide, wide + rows * inner,
          work, l.both.lows, work + hidden * c.across(rows), rows, hidden, inner, hidden, threads);
  forward(c, l.down, wide, y, work, rows, threads);
  add(y, mid, rows * hidden);
}
}
