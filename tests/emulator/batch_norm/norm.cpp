#include "norm.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <utility>

#include "math/activation.h"
#include "math/batch_norm.h"

#if defined(BRAZE_EMULATOR_MSAN)
#include <sanitizer/msan_interface.h>
#endif

namespace norm {

using namespace harness;

namespace {

size_t size_of(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }

}  // namespace

Array::Array(DType dtype, int64_t count, int phase) : count_(count), dtype_(dtype) {
  const size_t front = static_cast<size_t>(phase) * size_of(dtype);
  const size_t bytes = front + static_cast<size_t>(count) * size_of(dtype);
  if (!CHECK_OK(cudaMalloc(&memory_, bytes > 0 ? bytes : 1))) abort();
  data_ = memory_ + front;
}
Array::~Array() {
  if (memory_ != nullptr) (void)cudaFree(memory_);
}
Array& Array::operator=(Array&& other) noexcept {
  std::swap(memory_, other.memory_);
  std::swap(data_, other.data_);
  std::swap(count_, other.count_);
  std::swap(dtype_, other.dtype_);
  return *this;
}

double Array::get(int64_t i) const {
  switch (dtype_) {
    case DType::f32: return reinterpret_cast<const float*>(data_)[i];
    case DType::f64: return reinterpret_cast<const double*>(data_)[i];
    case DType::bf16: return from_storage(reinterpret_cast<const Bf16*>(data_)[i]);
    default: return from_storage(reinterpret_cast<const F16*>(data_)[i]);
  }
}
void Array::set(int64_t i, double value) {
  switch (dtype_) {
    case DType::f32: reinterpret_cast<float*>(data_)[i] = static_cast<float>(value); return;
    case DType::f64: reinterpret_cast<double*>(data_)[i] = value; return;
    case DType::bf16:
      to_storage(static_cast<float>(value), reinterpret_cast<Bf16*>(data_)[i]);
      return;
    default: to_storage(static_cast<float>(value), reinterpret_cast<F16*>(data_)[i]);
  }
}
void Array::zero() { memset(data_, 0, static_cast<size_t>(count_) * size_of(dtype_)); }
std::vector<char> Array::bytes() const {
  std::vector<char> copy(data_, data_ + static_cast<size_t>(count_) * size_of(dtype_));
#if defined(BRAZE_EMULATOR_MSAN)
  __msan_unpoison(copy.data(), copy.size());  // that rubbish has stayed is compared, too
#endif
  return copy;
}

const char* describe(const Spec& s) {
  static char text[200];
  snprintf(
      text, sizeof(text),
      "%lldx%lldx%lld last %d dtype %d act %d inputs %d res %d mask %d dy2 %d train %d place %d "
      "phase %d/%d mean %g sigma %g",
      static_cast<long long>(s.n), static_cast<long long>(s.c), static_cast<long long>(s.spatial),
      s.channels_last, static_cast<int>(s.dtype), static_cast<int>(s.activation), s.inputs,
      s.residual, s.mask, s.dy2, s.training, s.in_place, s.phase, s.phase_of_y, s.mean, s.sigma);
  return text;
}

int64_t offset_of(const Spec& s, int64_t image, int64_t channel, int64_t pixel) {
  return s.channels_last ? (image * s.spatial + pixel) * s.c + channel
                         : (image * s.c + channel) * s.spatial + pixel;
}
DType arithmetic(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }
double gaussian(Random& random) {
  double sum = -6;
  for (int i = 0; i < 12; ++i) sum += random.uniform();
  return sum;
}
double rounding(DType dtype) {
  return dtype == DType::f64   ? 0x1p-53
         : dtype == DType::f32 ? 0x1p-24
         : dtype == DType::f16 ? 0x1p-11
                               : 0x1p-8;
}

Memory::Memory(const cuda::NormScratchSize& size)
    : workspace(DType::f64, static_cast<int64_t>((size.workspace + 7) / 8)),
      tickets(DType::f32, static_cast<int64_t>(size.tickets)) {
  tickets.zero();
  scratch = {workspace.data(), static_cast<unsigned*>(tickets.data())};
}
void Memory::check() const {
  for (int64_t i = 0; i < tickets.count(); ++i) {
    if (!CHECK(static_cast<const unsigned*>(tickets.data())[i] == 0)) return;
  }
}

double activate(Activation activation, double value, double parameter) {
  double y = 0;
  with_activation(activation,
                  [&](auto a) { y = braze::activate<decltype(a)::value>(value, parameter); });
  return y;
}
double derivative(Activation activation, double value, double parameter) {
  double d = 0;
  with_activation(activation,
                  [&](auto a) { d = activation_derivative<decltype(a)::value>(value, parameter); });
  return d;
}
bool upper(Activation activation, double value, DType type) {
  bool result = false;
  with_activation(activation, [&](auto a) {
    if constexpr (has_two_slopes(decltype(a)::value)) {
      result = type == DType::f64
                   ? derivative_is_upper<decltype(a)::value>(value)
                   : derivative_is_upper<decltype(a)::value>(static_cast<float>(value));
    }
  });
  return result;
}
bool two_slopes(Activation activation) { return has_two_slopes(activation); }

bool near(double got, double want, double tolerance) {
  if (std::isnan(want)) return std::isnan(got);
  if (std::isinf(want)) return got == want;
  return got == want || std::fabs(got - want) <= tolerance;
}
bool near_sum(double got, double want, double tolerance) {
  return std::isfinite(want) ? near(got, want, tolerance) : !std::isfinite(got);
}

}  // namespace norm
