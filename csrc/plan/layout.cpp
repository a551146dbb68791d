#include "layout.h"

#include <algorithm>

namespace braze {
namespace {

bool is_empty(const std::vector<int64_t>& sizes) {
  return std::any_of(sizes.begin(), sizes.end(), [](int64_t s) { return s == 0; });
}

// Calls visit(offset in elements) for every logical index until it returns false.
template <class Visit>
bool for_each_offset(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                     Visit visit) {
  if (is_empty(sizes)) return true;
  std::vector<int64_t> index(sizes.size(), 0);
  int64_t offset = 0;
  while (true) {
    if (!visit(offset)) return false;
    int dim = static_cast<int>(sizes.size()) - 1;
    for (; dim >= 0; --dim) {
      offset += strides[dim];
      if (++index[dim] < sizes[dim]) break;
      offset -= sizes[dim] * strides[dim];
      index[dim] = 0;
    }
    if (dim < 0) return true;
  }
}

// One bit per byte of a span.
class ByteSet {
 public:
  explicit ByteSet(uintptr_t base, uintptr_t end) : base_(base), bits_(end - base, false) {}
  // False if any byte of the item was already there.
  bool insert(uintptr_t address, int64_t itemsize) {
    for (int64_t b = 0; b < itemsize; ++b) {
      std::vector<bool>::reference bit = bits_[address - base_ + static_cast<uintptr_t>(b)];
      if (bit) return false;
      bit = true;
    }
    return true;
  }
  bool contains(uintptr_t address, int64_t itemsize) const {
    for (int64_t b = 0; b < itemsize; ++b) {
      const uintptr_t at = address + static_cast<uintptr_t>(b);
      if (at >= base_ && at - base_ < bits_.size() && bits_[at - base_]) return true;
    }
    return false;
  }

 private:
  uintptr_t base_;
  std::vector<bool> bits_;
};

bool share_a_byte(const Footprint& a, const Footprint& b) {
  if (a.end() <= b.base || b.end() <= a.base) return false;
  if (a.dense && b.dense) return true;
  ByteSet bytes(a.base, a.end());
  for_each_offset(a.sizes, a.strides, [&](int64_t offset) {
    bytes.insert(a.base + static_cast<uintptr_t>(offset * a.itemsize), a.itemsize);
    return true;
  });
  return !for_each_offset(b.sizes, b.strides, [&](int64_t offset) {
    return !bytes.contains(b.base + static_cast<uintptr_t>(offset * b.itemsize), b.itemsize);
  });
}

}  // namespace

void simplify(Layout& layout) {
  const size_t ndim = layout.sizes.size();
  std::vector<size_t> order;
  for (size_t d = 0; d < ndim; ++d) {
    if (layout.sizes[d] != 1) order.push_back(d);
  }
  const std::vector<int64_t> lead = layout.strides.front();
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return lead[a] > lead[b]; });
  Layout merged;
  merged.strides.resize(layout.strides.size());
  for (const size_t d : order) {
    bool joins = !merged.sizes.empty();
    for (size_t k = 0; joins && k < layout.strides.size(); ++k) {
      joins = merged.strides[k].back() == layout.strides[k][d] * layout.sizes[d];
    }
    if (joins) {
      merged.sizes.back() *= layout.sizes[d];
    } else {
      merged.sizes.push_back(layout.sizes[d]);
    }
    for (size_t k = 0; k < layout.strides.size(); ++k) {
      if (joins) {
        merged.strides[k].back() = layout.strides[k][d];
      } else {
        merged.strides[k].push_back(layout.strides[k][d]);
      }
    }
  }
  layout = std::move(merged);
}

bool is_non_overlapping(const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides) {
  if (is_empty(sizes)) return true;
  std::vector<size_t> order;
  for (size_t d = 0; d < sizes.size(); ++d) {
    if (sizes[d] > 1) order.push_back(d);
  }
  std::sort(order.begin(), order.end(),
            [&](size_t a, size_t b) { return strides[a] < strides[b]; });
  int64_t reach = 0;
  bool nested = true;
  for (const size_t d : order) {
    nested = nested && strides[d] > reach;
    reach += strides[d] * (sizes[d] - 1);
  }
  if (nested) return true;
  ByteSet seen(0, static_cast<uintptr_t>(reach) + 1);
  return for_each_offset(sizes, strides, [&](int64_t offset) {
    return seen.insert(static_cast<uintptr_t>(offset), 1);
  });
}

uintptr_t Footprint::end() const {
  if (is_empty(sizes)) return base;
  int64_t last = 0;
  for (size_t d = 0; d < sizes.size(); ++d) last += (sizes[d] - 1) * strides[d];
  return base + static_cast<uintptr_t>((last + 1) * itemsize);
}

OverlapPair find_overlap(const std::vector<Footprint>& footprints) {
  std::vector<size_t> order;
  for (size_t i = 0; i < footprints.size(); ++i) {
    if (footprints[i].end() != footprints[i].base) order.push_back(i);
  }
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return footprints[a].base < footprints[b].base; });
  // Clusters of spans that reach into one another; the elements of one cluster go into one set.
  for (size_t begin = 0, end; begin < order.size(); begin = end) {
    uintptr_t reach = footprints[order[begin]].end();
    for (end = begin + 1; end < order.size() && footprints[order[end]].base < reach; ++end) {
      reach = std::max(reach, footprints[order[end]].end());
    }
    if (end == begin + 1) continue;
    ByteSet taken(footprints[order[begin]].base, reach);
    for (size_t k = begin; k < end; ++k) {
      const Footprint& f = footprints[order[k]];
      const bool free = for_each_offset(f.sizes, f.strides, [&](int64_t offset) {
        return taken.insert(f.base + static_cast<uintptr_t>(offset * f.itemsize), f.itemsize);
      });
      for (size_t j = begin; !free && j < k; ++j) {
        if (share_a_byte(footprints[order[j]], f)) {
          return {static_cast<int64_t>(std::min(order[j], order[k])),
                  static_cast<int64_t>(std::max(order[j], order[k]))};
        }
      }
    }
  }
  return {};
}

}  // namespace braze
