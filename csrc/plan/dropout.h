// Dropout as kernels get it: pointers, sizes and flags, no torch. Filled by ops/, read by cpu/ and
// cuda/.
#pragma once
#include "../math/dropout.h"
#include "../math/hook.h"
#include "tensor_work.h"

namespace braze {

// Where the random numbers come from: as numbers, or in device memory, where a captured graph finds
// those of its present replay.
struct RandomState {
  uint64_t seed = 0, offset = 0;
  const int64_t* seed_pointer = nullptr;    // not null: instead of seed
  const int64_t* offset_pointer = nullptr;  // not null: added to offset

  BRAZE_INLINE RandomState read() const {
    RandomState state;
    state.seed =
        BRAZE_HOOK(own_seed, seed_pointer == nullptr) ? seed : static_cast<uint64_t>(*seed_pointer);
    state.offset = offset_pointer == nullptr
                       ? offset
                       : BRAZE_HOOK(own_offset, offset) + static_cast<uint64_t>(*offset_pointer);
    return state;
  }
};

// Which mask index element i of memory has: i, or that of its channel, sample * channels + channel.
// Channels last: element (n, s, c) is at (n * spatial + s) * channels + c, else (n, c, s) at
// (n * channels + c) * spatial + s.
struct DropoutMask {
  enum Kind : int32_t { element, row, channels_last };
  Kind kind = element;
  int64_t channels = 1, spatial = 1;  // not read where the kind is element
};

enum class DropoutStep : int32_t {
  scale,     // out = kept ? scale x + shift : dropped
  add,       // out = kept ? scale x + second : second
  activate,  // out = kept ? scale activation(x) : 0
  // out = kept ? scale second activation'(x) : 0; of relu, x is the output of `activate`, which
  // says whether it was kept
  activate_grad,
};

// Every tensor is dense, in one order, of one dtype; out may be x or second.
struct DropoutArgs {
  DropoutStep step = DropoutStep::scale;
  DType dtype = DType::f32;
  int64_t numel = 0;
  const void* x = nullptr;
  const void* second = nullptr;
  void* out = nullptr;
  uint32_t threshold = 0;
  DropoutTerms<double> terms = {1, -0.0, 0};
  Activation activation = Activation::identity;
  double parameter = 0;
  DropoutMask mask;
  RandomState random;
  int64_t* used = nullptr;  // null, or where seed and offset go, for the backward pass

  BRAZE_INLINE bool needs_mask() const {
    return !(step == DropoutStep::activate_grad && activation == Activation::relu);
  }
};

}  // namespace braze
