// CPU optimizer kernels: plain pointers in, no torch. One parallel region per call.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "../math/optimizer.h"
#include "../plan/chunks.h"

namespace braze::cpu {

// Hyper-parameters of one (group, step count), rounded once to both arithmetic types.
struct AdamHyper {
  AdamArgs<float> f;
  AdamArgs<double> d;
  bool penalty;
  bool amsgrad;
};

struct SgdHyper {
  SgdArgs<float> f;
  SgdArgs<double> d;
  bool penalty;
  bool has_momentum;
  bool nesterov;
};

// sum = keep * sum + weight * grad, in TensorWork::state[0].
struct FoldHyper {
  double weight, keep;
};

void adam_step(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
               const std::vector<AdamHyper>& hypers, int threads);
void sgd_step(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
              const std::vector<SgdHyper>& hypers, int threads);
void fold_gradients(const std::vector<TensorWork>& tensors, const ChunkList& chunks,
                    const std::vector<FoldHyper>& hypers, int threads);

// Instruction sets compiled in and runnable here, slowest first; results do not depend on the
// choice.
std::vector<std::string> available_instruction_sets();
std::string instruction_set();
bool set_instruction_set(const std::string& name);  // false: not available

}  // namespace braze::cpu
