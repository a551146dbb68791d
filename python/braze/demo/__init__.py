"""The demonstration: a network trained with torch, and its twin with braze.optim (and braze.nn)."""
