// Which parameters a call works on: every gradient is looked up, and while at it every tensor is
// compared with what the plan knows of it.
#pragma once
#include <deque>
#include <functional>
#include <span>
#include <string>
#include <vector>

#include "overlap.h"

namespace braze {

// One parameter with work in this call.
struct Active {
  Slot* slot;
  const at::Tensor* grad;  // null: none present, only the open window has something for this slot
  bool linear;             // everything dense in the parameter's order
  bool first = false;      // what is written to holds nothing yet
  bool first_average = false;
  bool counted = false;     // the CPU keeps its step count
  bool repeatable = false;  // the next step may take it over as it stands
  double step = 0;          // the count after this step, where the CPU keeps it
  int32_t hyper = 0;
};

class Gradients {
 public:
  // True if no tensor changed. `compare` runs on the calling thread beside the look-up, for it
  // needs the GIL, and has the same answer of Python's objects.
  bool look_up(const Parameters& parameters, const std::function<bool()>& compare);

  // Fills `active` from what look_up() found. Returns "", or why torch's own code must do this
  // step. With `include_window`, parameters without a gradient that have a part in an open window
  // are active as well. `may_repeat`: active may stay as it is, with other gradients; see
  // repeating.
  std::string choose(Parameters& parameters, const WrittenMemory& written, bool include_window,
                     bool may_repeat);
  // The step has come to its end, and one that finds the same again may repeat it.
  void remember(const Parameters& parameters);
  void clear();
  // Lets go of gradients that choose() had to make.
  void release() { made_.clear(); }

  std::vector<Active> active;
  // This step works on the same tensors in the same way as the one before. Most do.
  bool repeating = false;

 private:
  enum Finding : uint8_t {
    changed,      // a tensor of this slot is not what it was: everything is built anew
    no_gradient,  // not active, unless an open window has something for it
    usual,        // the parameter's dtype, device and order in memory: repeatable
    other_order,  // the same but for the order: element by element
    unusual,      // checked further, see check_unusual()
  };
  struct Found {
    const at::Tensor* grad;
    Finding finding;
  };

  Found find(const Parameters& parameters, size_t slot) const;
  bool repeats(const Parameters& parameters) const;
  std::string check_unusual(const Parameters& parameters, Active& active, const at::Tensor& grad);

  std::vector<Found> found_;  // [slot]
  std::deque<at::Tensor> made_;
  // Of the last step, if it came to its end.
  std::vector<Finding> last_findings_;  // [slot]; empty: none
  std::vector<GroupNeeds> last_needs_;  // [group]
  int64_t last_build_ = -1;
};

}  // namespace braze
