// Memory of the emulated device's tensors, which torch's CPU allocator would give away too early:
// while work that reads it is queued, or is in a graph.
#pragma once

namespace emulated_memory {

// Memory freed while work is queued stays until that has run.
void set_deferred(bool deferred);
// After a wait for all work.
void work_has_run();

// Memory allocated in between belongs to the graph that is being captured.
void begin_capture();
void end_capture();
// The last graph is gone when all are that were captured.
void graph_destroyed();

}  // namespace emulated_memory
