#include "measured.h"

#include <ATen/ops/cat.h>

namespace braze {

Measured combined(const std::vector<Measured>& measured, double norm_scale,
                  const at::Tensor* grad_scale) {
  if (measured.size() == 1) return measured.front();
  const c10::Device device = measured.front().squares.device();
  const auto here = [&](const at::Tensor& tensor) {
    return tensor.to(device, c10::kDouble, /*non_blocking=*/true);
  };
  std::vector<at::Tensor> squares;
  for (const Measured& m : measured) squares.push_back(here(m.squares));
  const at::Tensor all = at::cat(squares), total = all.sum();
  at::Tensor norm = total.sqrt().mul(norm_scale);
  if (grad_scale != nullptr) norm = norm.div(here(*grad_scale).reshape({}));
  return {.squares = all,
          .norm = norm.to(c10::kFloat),
          .found_inf = total.isfinite().logical_not().to(c10::kFloat).reshape({1})};
}

}  // namespace braze
