// The state that a step needs and does not find: made, taken back, and what an accumulation window
// leaves in it.
#pragma once
#include <utility>
#include <vector>

#include "gradients.h"

namespace braze {

// What a call writes: parameters, or (fold) the sums of an accumulation window.
struct Destination {
  bool fold = false;
  bool into_state = false;  // the sums are in states[0] where they can be
  bool averages = false;    // running averages of the parameters
  bool operator==(const Destination&) const = default;
};

// Whether the gradients of this slot's window are summed up in states[0] rather than in an
// accumulator.
bool sums_in_state(const Parameters& parameters, const Slot& slot, const Destination& destination);

class States {
 public:
  // Allocates all that is missing, then enters it into Python's state: an allocation that fails
  // changes nothing. `refuse` is called before the first entry. True if memory was allocated.
  bool create(Parameters& parameters, PyObject* state, std::vector<Active>& active,
              const Destination& destination, const std::function<void()>& refuse);
  // Takes the entries of this call's create() back, except where in_use(device): a new buffer holds
  // nothing yet, and the next step would take it for one that does. True if there were any.
  bool undo(PyObject* state, const std::function<bool(int32_t device)>& in_use);
  // This call's entries stay.
  void commit() { created_.clear(); }
  // states[0] of these slots is part of an open window from now on.
  void enter_window(Parameters& parameters, PyObject* state, const std::vector<Slot*>& slots) const;
  // Nothing of a window stays in Python's state.
  void leave_window(Parameters& parameters, PyObject* state);
  void reset(size_t slots);

 private:
  std::vector<std::pair<Slot*, PyObject*>> created_;  // by key
  std::vector<at::Tensor>
      spare_sums_;  // [slot] accumulators between windows, out of Python's sight
};

}  // namespace braze
