// The reference runs on one thread: its parallel regions are compiled without OpenMP.
#pragma once
inline int omp_get_thread_num() { return 0; }
inline int omp_get_num_threads() { return 1; }
