// Ends what set_begin.h begins.
#if defined(__clang__) && BRAZE_LEVEL > 0
#pragma clang attribute pop
#endif
