#include "interface.h"

namespace braze {

const char* kernels_interface() { return kInterface; }

}  // namespace braze
