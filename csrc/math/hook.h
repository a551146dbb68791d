// BRAZE_HOOK(name, value): a named place where a test can put a fault, such as the value plus one;
// else the value. tests/cuda/test_kernel_faults.py says which faults, and that each is noticed.
#pragma once

#if !defined(BRAZE_HOOK)
#define BRAZE_HOOK(name, ...) (__VA_ARGS__)
#endif
