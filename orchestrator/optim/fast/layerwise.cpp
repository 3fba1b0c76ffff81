// One step of LARS, or of the family of Adam with layer adaptation, over many float32 tensors.
//
// Every tensor is walked twice at most: the first pass moves the moments and adds up the two squared norms, the second
// moves the weights, from the end to the beginning, because the end is what the cache still holds. Tensors that are
// not adapted are walked once. No tensor is allocated. Plain C in, plain C out: no header of torch is needed.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <thread>
#include <vector>

#include "vector.h"

extern "C" {

// What a step does to a tensor of the family of Adam, d = m / (scale sqrt(v) + offset):
//   m <- beta1 m + gradient1 g,  v <- beta2 v + gradient2 g^2
//   x = normed_direction d + normed_moment m + normed_weight w,  ratio = ||w|| / ||x||
//   w <- keep w - rate ratio (direction d + moment m + weight w),  then slow <- slow + slow_step (w - slow), w <- slow
struct AdamRule {
  double beta1, gradient1, beta2, gradient2, scale, offset;
  double normed_direction, normed_moment, normed_weight;
  double keep, rate, direction, moment, weight;
  double slow_step;       // 0: no synchronization in this step
  double is_adapted;      // 0: ratio 1
  double largest_norm;    // ||w|| counts as this at most
  double norm_scale;      // ||w|| counts as this many times itself
};

// buffer <- momentum buffer + ratio term (sign g + decay w),
// w <- w - along_buffer buffer - ratio along_term (sign g + decay w),  ratio = trust ||w|| / (||g|| + decay ||w||)
struct LarsRule {
  double momentum, term, sign, decay, along_buffer, along_term, trust, is_adapted;
};

struct Item {
  float* weight;
  const float* gradient;
  float* first;   // moment, or LARS's buffer; may be null there
  float* second;  // moment
  float* slow;
  int64_t size;
  int64_t row;  // elements over which the gradient is centralized; 0: it is not
  int64_t rule;
  double square_weight, square_other;
};

}  // extern "C"

namespace {

constexpr int64_t BLOCK = 1 << 14;  // elements that one thread takes at a time
constexpr int64_t PART = 1 << 12;   // elements whose squares are added up in float, lane by lane; parts in double

struct Sums {
  double weight = 0, other = 0;
};

inline float mean(const float* g, int64_t from, int64_t to) {
  double total = 0;
  for (int64_t start = from; start < to; start += PART) {
    Vec part = {};
    walk(start, std::min(to, start + PART), [&](int64_t i, int count, auto full) { part += get(g + i, count, full); });
    total += sum(part);
  }
  return float(total / double(to - from));
}

// First pass over [from, to). With apply (a tensor that is not adapted) the weights move at once.
template <bool ROOT, bool APPLY>
inline Sums adam_first(const Item& t, const AdamRule& r, int64_t from, int64_t to, float center) {
  const float beta1 = r.beta1, gradient1 = r.gradient1, beta2 = r.beta2, gradient2 = r.gradient2;
  const float scale = r.scale, offset = r.offset;
  const float along_direction = APPLY ? r.rate * r.direction : r.normed_direction;
  const float along_moment = APPLY ? r.rate * r.moment : r.normed_moment;
  const float along_weight = APPLY ? r.rate * r.weight : r.normed_weight;
  const float keep = r.keep, slow_step = r.slow_step;
  Vec weights = {}, others = {};
  walk(from, to, [&](int64_t i, int count, auto full) {
    const Vec g = get(t.gradient + i, count, full) - center;
    const Vec m = beta1 * get(t.first + i, count, full) + gradient1 * g;
    const Vec v = beta2 * get(t.second + i, count, full) + gradient2 * g * g;
    put(t.first + i, m, count, full);
    put(t.second + i, v, count, full);
    Vec w = get(t.weight + i, count, full);
    Vec x = along_moment * m;
    if constexpr (ROOT) x = m * (along_direction * inverse_root(v, scale, offset));
    x += along_weight * w;
    if constexpr (APPLY) {
      w = keep * w - x;
      if (slow_step != 0) {
        const Vec s = get(t.slow + i, count, full);
        w = s + slow_step * (w - s);
        put(t.slow + i, w, count, full);
      }
      put(t.weight + i, w, count, full);
    } else {
      if constexpr (!decltype(full)::value) {
        for (int j = count; j < LANES; ++j) x[j] = 0;
      }
      weights += w * w;
      others += x * x;
    }
  });
  return {sum(weights), sum(others)};
}

template <bool ROOT>
inline void adam_second(const Item& t, const AdamRule& r, int64_t from, int64_t to, double ratio) {
  const float scale = r.scale, offset = r.offset;
  const float along_direction = r.rate * ratio * r.direction, along_moment = r.rate * ratio * r.moment;
  const float along_weight = r.rate * ratio * r.weight, keep = r.keep, slow_step = r.slow_step;
  walk(from, to, [&](int64_t i, int count, auto full) {
    const Vec m = get(t.first + i, count, full);
    Vec x = along_moment * m;
    if constexpr (ROOT) x = m * (along_direction * inverse_root(get(t.second + i, count, full), scale, offset));
    Vec w = get(t.weight + i, count, full);
    w = keep * w - (x + along_weight * w);
    if (slow_step != 0) {
      const Vec s = get(t.slow + i, count, full);
      w = s + slow_step * (w - s);
      put(t.slow + i, w, count, full);
    }
    put(t.weight + i, w, count, full);
  });
}

double ratio_of(const Item& t, const AdamRule& r) {
  const double weight = std::sqrt(t.square_weight) * r.norm_scale, other = std::sqrt(t.square_other);
  if (weight == 0 || other == 0) return 1;
  return std::min(weight, r.largest_norm) / other;
}

struct Adam {
  using Rule = AdamRule;
  static bool in_one_pass(const Rule& r) { return r.is_adapted == 0; }
  static Sums first(const Item& t, const Rule& r, int64_t from, int64_t to) {
    const bool apply = in_one_pass(r);
    const bool root = apply ? r.direction != 0 : r.normed_direction != 0;
    Sums all;
    const int64_t row = t.row ? t.row : to - from;
    for (int64_t start = from; start < to; start += row) {
      const float center = t.row ? mean(t.gradient, start, start + row) : 0.0f;
      const int64_t end = start + row;
      const auto pass = apply ? (root ? adam_first<true, true> : adam_first<false, true>)
                              : (root ? adam_first<true, false> : adam_first<false, false>);
      for (int64_t part = start; part < end; part += PART) {
        const Sums s = pass(t, r, part, std::min(end, part + PART), center);
        all.weight += s.weight;
        all.other += s.other;
      }
    }
    return all;
  }
  static void second(const Item& t, const Rule& r, int64_t from, int64_t to) {
    const double ratio = ratio_of(t, r);
    if (r.direction != 0) adam_second<true>(t, r, from, to, ratio);
    else adam_second<false>(t, r, from, to, ratio);
  }
};

struct Lars {
  using Rule = LarsRule;
  static bool in_one_pass(const Rule&) { return false; }
  static Sums first(const Item& t, const Rule& r, int64_t from, int64_t to) {
    if (r.is_adapted == 0) return {};
    Sums all;
    for (int64_t part = from; part < to; part += PART) {
      Vec weights = {}, others = {};
      walk(part, std::min(to, part + PART), [&](int64_t i, int count, auto full) {
        const Vec w = get(t.weight + i, count, full), g = get(t.gradient + i, count, full);
        weights += w * w;
        others += g * g;
      });
      all.weight += sum(weights);
      all.other += sum(others);
    }
    return all;
  }
  static void second(const Item& t, const Rule& r, int64_t from, int64_t to) {
    const double weight = std::sqrt(t.square_weight), gradient = std::sqrt(t.square_other);
    const bool adapt = r.is_adapted != 0 && weight != 0 && gradient != 0;
    const double ratio = adapt ? r.trust * weight / (gradient + r.decay * weight) : 1;
    const float momentum = r.momentum, sign = r.sign, decay = r.decay, term = ratio * r.term;
    const float along_buffer = r.along_buffer, along_term = ratio * r.along_term;
    walk(from, to, [&](int64_t i, int count, auto full) {
      Vec w = get(t.weight + i, count, full);
      const Vec u = sign * get(t.gradient + i, count, full) + decay * w;
      w -= along_term * u;
      if (t.first) {
        const Vec b = momentum * get(t.first + i, count, full) + term * u;
        put(t.first + i, b, count, full);
        w -= along_buffer * b;
      }
      put(t.weight + i, w, count, full);
    });
  }
};

struct Block {
  int64_t item, from, to;
  Sums sums;
};

template <class Body>
void in_parallel(int64_t count, int threads, Body body) {
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t i; (i = next.fetch_add(1)) < count;) body(i);
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads; ++i) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
}

template <class Kind>
void run(Item* items, int64_t num_items, const typename Kind::Rule* rules, int passes, int threads) {
  int64_t total = 0;
  for (int64_t i = 0; i < num_items; ++i) total += items[i].size;
  if (total < 1 << 17) threads = 1;
  // One thread goes tensor by tensor, so that the second pass finds much in the cache; several share all blocks.
  const int64_t together = threads <= 1 ? 1 : num_items;
  std::vector<Block> blocks;
  for (int64_t begin = 0; begin < num_items; begin += together) {
    blocks.clear();
    for (int64_t k = begin; k < std::min(num_items, begin + together); ++k) {
      const int64_t step = items[k].row ? std::max<int64_t>(1, BLOCK / items[k].row) * items[k].row : BLOCK;
      for (int64_t from = 0; from < items[k].size; from += step)
        blocks.push_back({k, from, std::min(items[k].size, from + step), {}});
    }
    const int64_t count = blocks.size();
    if (passes & 1) {
      in_parallel(count, threads, [&](int64_t i) {
        Block& b = blocks[i];
        b.sums = Kind::first(items[b.item], rules[items[b.item].rule], b.from, b.to);
      });
      for (const Block& b : blocks) {  // in this order whatever the number of threads: the same sum
        items[b.item].square_weight += b.sums.weight;
        items[b.item].square_other += b.sums.other;
      }
    }
    if (passes & 2)
      in_parallel(count, threads, [&](int64_t i) {
        const Block& b = blocks[count - 1 - i];
        const auto& rule = rules[items[b.item].rule];
        if (!Kind::in_one_pass(rule)) Kind::second(items[b.item], rule, b.from, b.to);
      });
  }
}

}  // namespace

extern "C" {
// passes: 1 the first, 2 the second, 3 both. The sums of squares are left in, and taken from, the items.
void lowtide_adam(Item* items, int64_t num_items, const AdamRule* rules, int passes, int threads) {
  run<Adam>(items, num_items, rules, passes, threads);
}
void lowtide_lars(Item* items, int64_t num_items, const LarsRule* rules, int passes, int threads) {
  run<Lars>(items, num_items, rules, passes, threads);
}
}
