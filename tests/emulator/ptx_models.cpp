// Asynchronous copies of each thread, until they are waited for, and what a warp multiplies.
#include "emulator/ptx_models.h"

#include <cmath>
#include <deque>
#include <unordered_map>

#include "scheduler.h"

namespace emulator {
namespace {

struct Copy {
  void* to;
  const void* from;
};
struct Copies {
  std::deque<std::deque<Copy>> groups;  // the last is open
};

// By block, then by thread.
std::unordered_map<const Thread*, Copies>& all_copies() {
  static auto* const instance = new std::unordered_map<const Thread*, Copies>;
  return *instance;
}

Copies& copies_of_caller() {
  if (launch_now == nullptr) fail("cp.async outside a kernel");
  static const char key = 0;
  // Filled with 0xff when a block starts: what an earlier one left under way is not ours.
  auto* started = static_cast<unsigned char*>(shared_cell(&key, 1, 1));
  if (*started != 0) {
    for (const Thread& thread : block_now->threads) all_copies().erase(&thread);
    *started = 0;
  }
  Copies& copies = all_copies()[thread_now];
  if (copies.groups.empty()) copies.groups.emplace_back();
  return copies;
}

float bf16_of(uint32_t bits) {
  const uint32_t word = bits << 16;
  float value;
  memcpy(&value, &word, sizeof(value));
  return value;
}
// A table, for speed.
float f16_of(uint32_t bits) {
  static const std::vector<float>* const all = [] {
    auto* const values = new std::vector<float>(1 << 16);
    for (int i = 0; i < 1 << 16; ++i) {
      const int exponent = i >> 10 & 31, fraction = i & 1023;
      float value = std::ldexp(static_cast<float>(fraction), -24);
      if (exponent > 0) value = std::ldexp(1024.0f + static_cast<float>(fraction), exponent - 25);
      if (exponent == 31) value = fraction == 0 ? HUGE_VALF : NAN;
      (*values)[static_cast<size_t>(i)] = i >> 15 ? -value : value;
    }
    return values;
  }();
  return (*all)[bits];
}

// out: registers 0..3. Lane 8 i + r names row r of matrix i.
void load_matrices(bool transposed, uint32_t* const (&registers)[32], uint32_t (&out)[32][4]) {
  for (int lane = 0; lane < 32; ++lane) {
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      if (!transposed) {
        out[lane][i] = registers[8 * i + g][t];
        continue;
      }
      const auto half = [&](int row) {
        return registers[8 * i + row][g / 2] >> (16 * (g % 2)) & 0xffffu;
      };
      out[lane][i] = half(2 * t) | half(2 * t + 1) << 16;
    }
  }
}

// From c[4], a[4], b[2] of each lane. Exact products, summed in double and rounded once: the
// hardware rounds otherwise, within a few units in the last place of the largest term.
void multiply_matrices(float (*value_of)(uint32_t), uint32_t* const (&registers)[32],
                       uint32_t (&out)[32][4]) {
  double a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < 32; ++lane) {
    const uint32_t* const own = registers[lane];
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float sum;
      memcpy(&sum, own + i, sizeof(sum));
      c[g + i / 2 * 8][2 * t + i % 2] = sum;
    }
    for (int half = 0; half < 2; ++half) {
      const int shift = 16 * half;
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + half] = value_of(own[4 + i] >> shift & 0xffffu);
      }
      for (int i = 0; i < 2; ++i) {
        b[2 * t + 8 * i + half][g] = value_of(own[8 + i] >> shift & 0xffffu);
      }
    }
  }
  for (int row = 0; row < 16; ++row) {
    for (int k = 0; k < 16; ++k) {
      for (int column = 0; column < 8; ++column) c[row][column] += a[row][k] * b[k][column];
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) {
      const auto sum = static_cast<float>(c[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2]);
      memcpy(&out[lane][i], &sum, sizeof(sum));
    }
  }
}

}  // namespace

void compute_matrices(WarpOp op, uint32_t* const (&registers)[32]) {
  Unobserved unobserved;
  uint32_t out[32][4];
  if (op == WarpOp::ldmatrix || op == WarpOp::ldmatrix_trans) {
    load_matrices(op == WarpOp::ldmatrix_trans, registers, out);
  } else {
    multiply_matrices(op == WarpOp::mma_bf16 ? bf16_of : f16_of, registers, out);
  }
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4; ++i) give(registers[lane] + i, out[lane][i]);
  }
}

void async_copy(void* to, const void* from) {
  Unobserved unobserved;
  copies_of_caller().groups.back().push_back({to, from});
}

void async_copy_commit() {
  Unobserved unobserved;
  copies_of_caller().groups.emplace_back();
}

bool async_copy_landing(int pending, void** to, const void** from) {
  Unobserved unobserved;
  auto& groups = copies_of_caller().groups;
  while (static_cast<int>(groups.size()) - 1 > pending) {
    if (groups.front().empty()) {
      groups.pop_front();
      continue;
    }
    give(to, groups.front().front().to);
    give(from, groups.front().front().from);
    groups.front().pop_front();
    return true;
  }
  return false;
}

}  // namespace emulator
