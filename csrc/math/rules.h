// The list of all rules: a new one is entered here, and nowhere else in csrc.
#pragma once
#include "adam.h"
#include "clip.h"
#include "fold.h"
#include "lion.h"
#include "rmsprop.h"
#include "sgd.h"

namespace braze {

template <class... Rule>
struct RuleList {
  static constexpr int kCount = sizeof...(Rule);

  template <class R>
  static constexpr int index_of() {
    int index = 0;
    const bool found = ((std::is_same_v<R, Rule> || (++index, false)) || ...);
    return found ? index : -1;
  }

  // body(Rule{}) for the rule at `index`.
  template <class Body>
  static void visit(int index, const Body& body) {
    int k = 0;
    (void)((k++ == index && (body(Rule{}), true)) || ...);
  }
};

using Rules = RuleList<Adam, Sgd, Fold, Clip, Rmsprop, Lion>;

}  // namespace braze
