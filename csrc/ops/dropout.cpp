#include "dropout.h"

#include <ATen/MemoryOverlap.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/library.h>

#include "activation.h"
#include "dense.h"
#include "launch.h"
#include "new_like.h"
#include "tensor_work.h"

namespace braze {
namespace {

uint32_t threshold_of(double p) {
  TORCH_CHECK_VALUE(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  return dropout_threshold(p);
}

void check_state(const at::Tensor& like, const at::Tensor& state, const char* op) {
  TORCH_CHECK_TYPE(state.scalar_type() == at::kLong, op,
                   ": `rng_state` must be an int64 tensor [seed, offset], got ",
                   state.scalar_type());
  TORCH_CHECK_VALUE(state.dim() == 1 && state.numel() == 2 && state.is_contiguous(), op,
                    ": `rng_state` must be a contiguous tensor [seed, offset], got shape ",
                    state.sizes());
  TORCH_CHECK_VALUE(state.device() == like.device(), op, ": `rng_state` must be on ", like.device(),
                    " as the other tensors are; got ", state.device());
}

// The tensor itself, or a copy in the order of its strides if they leave gaps or overlap.
at::Tensor dense(const at::Tensor& tensor) {
  if (tensor.is_non_overlapping_and_dense()) return tensor;
  at::Tensor copy = new_like(tensor);
  copy.copy_(tensor);
  return copy;
}

DropoutArgs basic_args(const at::Tensor& input, double p, bool alpha) {
  DropoutArgs args;
  args.dtype = *real_dtype(input.scalar_type());
  args.numel = input.numel();
  args.threshold = threshold_of(p);
  args.terms = alpha ? alpha_dropout_terms(args.threshold) : dropout_terms(args.threshold);
  return args;
}

void set_pointers(DropoutArgs& args, const at::Tensor& x, const at::Tensor* second,
                  at::Tensor& out) {
  args.x = x.const_data_ptr();
  args.second = second == nullptr ? nullptr : second->const_data_ptr();
  args.out = out.mutable_data_ptr();
}

at::Tensor new_state(const at::Tensor& like, DropoutArgs& args) {
  at::Tensor state = new_array(like, {2}, at::kLong);
  args.used = state.mutable_data_ptr<int64_t>();
  return state;
}

void draw_and_launch(const at::Tensor& like, DropoutArgs& args,
                     const OptionalGenerator& generator) {
  launch(like, DrawArgs{generator, args.random});
  launch(like, args);
}

void use_state(const at::Tensor& state, DropoutArgs& args) {
  args.random.seed_pointer = state.const_data_ptr<int64_t>();
  args.random.offset_pointer = args.random.seed_pointer + 1;
}

// `input`, if its memory is rows or pixels, else a contiguous copy.
at::Tensor lay_out_channels(const at::Tensor& input, DropoutMask& mask) {
  TORCH_CHECK(input.dim() >= 2, "Feature dropout requires at least 2 dimensions in the input");
  mask.channels = input.size(1);
  mask.spatial = input.numel() == 0 ? 1 : input.numel() / (input.size(0) * mask.channels);
  const bool rows = input.is_contiguous(), pixels = input.movedim(1, -1).is_contiguous();
  // A single value per channel: the index of the channel is that of the element.
  if (mask.spatial != 1 || !(rows || pixels)) {
    mask.kind = pixels && !rows ? DropoutMask::channels_last : DropoutMask::row;
  }
  return rows || pixels ? input : input.contiguous();
}

at::Tensor lay_out(const at::Tensor& input, bool feature, DropoutArgs& args) {
  const at::Tensor x = dense(input);
  return feature ? lay_out_channels(x, args.mask) : x;
}

// `out` in the order that torch gives the result: whole channels are neither rows nor pixels in
// some.
at::Tensor ordered(const at::Tensor& out, const at::Tensor& input, bool feature) {
  if (!feature || same_order(out, input)) return out;
  at::Tensor result = new_like(input);
  if (same_order(out, result)) return out;
  result.copy_(out);
  return result;
}

// The implementations, for CPU and device tensors alike. What can fail comes before the draw.

DropoutResult dropout_impl(const at::Tensor& input, double p, bool alpha, bool feature,
                           OptionalGenerator generator, const OptionalTensor&) {
  check_readable("dropout", "input", input);
  DropoutArgs args = basic_args(input, p, alpha);
  const at::Tensor x = lay_out(input, feature, args);
  at::Tensor out = new_like(x), state = new_state(x, args);
  set_pointers(args, x, nullptr, out);
  draw_and_launch(x, args, generator);
  return {ordered(out, input, feature), state};
}

at::Tensor dropout_inplace_impl(at::Tensor& input, double p, bool alpha, bool feature,
                                OptionalGenerator generator) {
  check_readable("dropout_", "input", input);
  at::assert_no_internal_overlap(input);
  DropoutArgs args = basic_args(input, p, alpha);
  at::Tensor x = lay_out(input, feature, args), state = new_state(x, args);
  set_pointers(args, x, nullptr, x);
  draw_and_launch(x, args, generator);
  if (!x.is_same(input)) input.copy_(x);
  return state;
}

at::Tensor dropout_apply_impl(const at::Tensor& input, const at::Tensor& state, double p,
                              bool alpha, bool feature, bool gradient) {
  check_readable("dropout_apply", "input", input);
  check_state(input, state, "dropout_apply");
  DropoutArgs args = basic_args(input, p, alpha);
  if (gradient) args.terms = linear_part(args.terms);
  const at::Tensor x = lay_out(input, feature, args);
  at::Tensor out = new_like(x);
  set_pointers(args, x, nullptr, out);
  use_state(state, args);
  launch(x, args);
  return ordered(out, input, feature);
}

DropoutResult dropout_add_impl(const at::Tensor& input, const at::Tensor& residual, double p,
                               OptionalGenerator generator, const OptionalTensor&) {
  check_readable("dropout_add", "input", input);
  check_like("dropout_add", "residual", residual, input, "input");
  DropoutArgs args = basic_args(input, p, false);
  args.step = DropoutStep::add;
  const at::Tensor x = dense(input), second = in_order_of(residual, x);
  at::Tensor out = new_like(x), state = new_state(x, args);
  set_pointers(args, x, &second, out);
  draw_and_launch(x, args, generator);
  return {out, state};
}

DropoutArgs activation_args(const at::Tensor& input, double p, std::string_view activation,
                            double parameter) {
  DropoutArgs args = basic_args(input, p, false);
  args.step = DropoutStep::activate;
  args.activation = activation_named(activation);
  args.parameter = parameter;
  return args;
}

DropoutResult act_dropout_impl(const at::Tensor& input, double p, std::string_view activation,
                               double parameter, OptionalGenerator generator,
                               const OptionalTensor&) {
  check_readable("act_dropout", "input", input);
  DropoutArgs args = activation_args(input, p, activation, parameter);
  const at::Tensor x = dense(input);
  at::Tensor out = new_like(x), state = new_state(x, args);
  set_pointers(args, x, nullptr, out);
  draw_and_launch(x, args, generator);
  return {out, state};
}

at::Tensor act_dropout_inplace_impl(at::Tensor& input, double p, std::string_view activation,
                                    double parameter, OptionalGenerator generator) {
  check_readable("act_dropout_", "input", input);
  at::assert_no_internal_overlap(input);
  DropoutArgs args = activation_args(input, p, activation, parameter);
  at::Tensor x = dense(input), state = new_state(x, args);
  set_pointers(args, x, nullptr, x);
  draw_and_launch(x, args, generator);
  if (!x.is_same(input)) input.copy_(x);
  return state;
}

at::Tensor act_dropout_backward_impl(const at::Tensor& grad, const at::Tensor& saved,
                                     const at::Tensor& state, double p, std::string_view activation,
                                     double parameter) {
  check_readable("act_dropout_backward", "saved", saved);
  check_like("act_dropout_backward", "grad", grad, saved, "saved");
  check_state(saved, state, "act_dropout_backward");
  DropoutArgs args = activation_args(saved, p, activation, parameter);
  args.step = DropoutStep::activate_grad;
  const at::Tensor x = dense(saved), second = in_order_of(grad, x);
  at::Tensor out = new_like(x);
  set_pointers(args, x, &second, out);
  use_state(state, args);
  launch(x, args);
  return out;
}

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace

DropoutResult dropout(const at::Tensor& input, double p, bool alpha, bool feature,
                      const OptionalGenerator& generator, const OptionalTensor& distinct) {
  static const auto op = find<decltype(dropout_impl)>("braze::dropout");
  return op.call(input, p, alpha, feature, generator, distinct);
}

at::Tensor dropout_(at::Tensor& input, double p, bool alpha, bool feature,
                    const OptionalGenerator& generator) {
  static const auto op = find<decltype(dropout_inplace_impl)>("braze::dropout_");
  return op.call(input, p, alpha, feature, generator);
}

at::Tensor dropout_apply(const at::Tensor& input, const at::Tensor& rng_state, double p, bool alpha,
                         bool feature, bool gradient) {
  static const auto op = find<decltype(dropout_apply_impl)>("braze::dropout_apply");
  return op.call(input, rng_state, p, alpha, feature, gradient);
}

DropoutResult dropout_add(const at::Tensor& input, const at::Tensor& residual, double p,
                          const OptionalGenerator& generator, const OptionalTensor& distinct) {
  static const auto op = find<decltype(dropout_add_impl)>("braze::dropout_add");
  return op.call(input, residual, p, generator, distinct);
}

DropoutResult act_dropout(const at::Tensor& input, double p, std::string_view activation,
                          double parameter, const OptionalGenerator& generator,
                          const OptionalTensor& distinct) {
  static const auto op = find<decltype(act_dropout_impl)>("braze::act_dropout");
  return op.call(input, p, activation, parameter, generator, distinct);
}

at::Tensor act_dropout_(at::Tensor& input, double p, std::string_view activation, double parameter,
                        const OptionalGenerator& generator) {
  static const auto op = find<decltype(act_dropout_inplace_impl)>("braze::act_dropout_");
  return op.call(input, p, activation, parameter, generator);
}

at::Tensor act_dropout_backward(const at::Tensor& grad, const at::Tensor& saved,
                                const at::Tensor& rng_state, double p, std::string_view activation,
                                double parameter) {
  static const auto op = find<decltype(act_dropout_backward_impl)>("braze::act_dropout_backward");
  return op.call(grad, saved, rng_state, p, activation, parameter);
}

bool dropout_takes(const at::Tensor& input) {
  using c10::DispatchKey;
  // A trace should not need braze to be run.
  for (const DispatchKey key : {DispatchKey::FuncTorchDynamicLayerFrontMode, DispatchKey::Tracer}) {
    if (c10::impl::tls_is_dispatch_key_included(key)) return false;
  }
  if (input._fw_grad(0).defined() || input.is_nested()) return false;
  return real_dtype(input.scalar_type()).has_value() && !input.is_complex() && is_plain(input) &&
         (input.is_cpu() || device_place(input).backend != nullptr);
}

DropoutTerms<double> dropout_terms_of(double p, bool alpha) {
  const uint32_t threshold = threshold_of(p);
  return alpha ? alpha_dropout_terms(threshold) : dropout_terms(threshold);
}

}  // namespace braze

// Strides are part of what the ops promise: the mask is indexed in the order of memory.
TORCH_LIBRARY_FRAGMENT(braze, m) {
  using at::Tag;
  const std::vector<Tag> draws = {Tag::nondeterministic_seeded, Tag::needs_exact_strides};
  const std::vector<Tag> pure = {Tag::needs_exact_strides};
  m.def(
      "dropout(Tensor input, float p, bool alpha=False, bool feature=False, *, "
      "Generator? generator=None, Tensor? distinct=None) -> (Tensor output, Tensor rng_state)",
      draws);
  m.def(
      "dropout_(Tensor(a!) input, float p, bool alpha=False, bool feature=False, *, "
      "Generator? generator=None) -> Tensor rng_state",
      draws);
  m.def(
      "dropout_apply(Tensor input, Tensor rng_state, float p, bool alpha=False, "
      "bool feature=False, bool gradient=False) -> Tensor",
      pure);
  m.def(
      "dropout_add(Tensor input, Tensor residual, float p, *, Generator? generator=None, "
      "Tensor? distinct=None) -> (Tensor output, Tensor rng_state)",
      draws);
  m.def(
      "act_dropout(Tensor input, float p, str activation, float parameter=0., *, "
      "Generator? generator=None, Tensor? distinct=None) -> (Tensor output, Tensor rng_state)",
      draws);
  m.def(
      "act_dropout_(Tensor(a!) input, float p, str activation, float parameter=0., *, "
      "Generator? generator=None) -> Tensor rng_state",
      draws);
  m.def(
      "act_dropout_backward(Tensor grad, Tensor saved, Tensor rng_state, float p, str activation, "
      "float parameter=0.) -> Tensor",
      pure);
}

namespace braze {
namespace {

void implement_dropout(torch::Library& m) {
  m.impl("dropout", dropout_impl);
  m.impl("dropout_", dropout_inplace_impl);
  m.impl("dropout_apply", dropout_apply_impl);
  m.impl("dropout_add", dropout_add_impl);
  m.impl("act_dropout", act_dropout_impl);
  m.impl("act_dropout_", act_dropout_inplace_impl);
  m.impl("act_dropout_backward", act_dropout_backward_impl);
}

}  // namespace
}  // namespace braze

TORCH_LIBRARY_IMPL(braze, CPU, m) { braze::implement_dropout(m); }
TORCH_LIBRARY_IMPL(braze, CUDA, m) { braze::implement_dropout(m); }
