"""The demonstration: one network trained with torch's parts, its twin with braze.optim and, if asked for, braze.nn."""
