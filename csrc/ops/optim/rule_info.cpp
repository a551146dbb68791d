#include "rule_info.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <cmath>

#include "../../plan/hyper.h"
#include "python.h"

namespace braze {
namespace {

template <class Rule>
const typename Rule::Options& as(const void* options) {
  return *static_cast<const typename Rule::Options*>(options);
}

template <class Rule>
class TableOf final : public HyperTable {
 public:
  void clear(bool on_device) override {
    on_device_ = on_device;
    hypers_.clear();
    device_hypers_.clear();
  }
  void add(const void* options, const StepInputs& inputs, const DeviceScalar* scalars) override {
    if (!on_device_) {
      hypers_.push_back(make_hyper<Rule>(as<Rule>(options), inputs, power_));
      return;
    }
    DeviceHyper<Rule>& hyper = device_hypers_.emplace_back();
    hyper.options = as<Rule>(options);
    hyper.inputs = inputs;
    std::copy_n(scalars, kDeviceFields<Rule>, hyper.scalars);
  }
  Hypers view() const override { return on_device_ ? view_of(device_hypers_) : view_of(hypers_); }

 private:
  bool on_device_ = false;
  std::vector<Hyper<Rule>> hypers_;
  std::vector<DeviceHyper<Rule>> device_hypers_;
  PowerCache power_;
};

template <class Rule>
RuleInfo describe() {
  static_assert(sizeof(typename Rule::Options) <= kMaxOptionBytes);
  static_assert(kDeviceFields<Rule> <= kMaxDeviceFields && Rule::kStates <= kMaxStates);
  RuleInfo info{
      .name = Rule::kName,
      .fields = Rule::kFields,
      .field_keys = {},
      .state_keys = {},
      .counts_steps = Rule::kCountsSteps,
      .first_overwrites = Rule::kFirstOverwrites,
      .states =
          [](const void* options) {
            const uint32_t flags = Rule::flags(as<Rule>(options));
            uint32_t states = 0;
            for (int k = 0; k < Rule::kStates; ++k) states |= Rule::uses(flags, k) << k;
            return states;
          },
      .zeros_serve = [](const void* options) { return Rule::zeros_serve(as<Rule>(options)); },
      .sum_in_state = nullptr,
      .make_table = []() -> std::unique_ptr<HyperTable> {
        return std::make_unique<TableOf<Rule>>();
      }};
  if constexpr (Rule::kSumsInState) {
    info.sum_in_state = [](const void* options) { return Rule::sum_in_state(as<Rule>(options)); };
  }
  for (const Field& field : Rule::kFields) info.field_keys.push_back(intern(field.name));
  for (const char* state : Rule::kStateNames) info.state_keys.push_back(intern(state));
  return info;
}

template <class... Rule>
std::vector<RuleInfo> describe_all(RuleList<Rule...>) {
  std::vector<RuleInfo> all;
  const auto add = [&]<class R>(R) {
    if constexpr (R::kIsOptimizer) all.push_back(describe<R>());
  };
  (add(Rule{}), ...);
  return all;
}

}  // namespace

double PowerCache::operator()(double base, double exponent) {
  for (const Entry& entry : entries_) {
    if (entry.base == base && entry.exponent == exponent) return entry.result;
  }
  const bool whole = exponent == std::floor(exponent);
  const double result = whole ? WholePower{}(base, exponent) : FractionalPower{}(base, exponent);
  entries_[next_] = {base, exponent, result};
  next_ = 1 - next_;
  return result;
}

const RuleInfo& rule_named(const std::string& name) {
  static const auto* const all = new std::vector<RuleInfo>(describe_all(Rules{}));
  std::string names;
  for (const RuleInfo& info : *all) {
    if (name == info.name) return info;
    names += (names.empty() ? "'" : ", '") + std::string(info.name) + "'";
  }
  C10_THROW_ERROR(ValueError, c10::str("algorithm must be one of ", names, ", got '", name, "'"));
}

}  // namespace braze
