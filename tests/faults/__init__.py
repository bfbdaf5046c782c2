"""Faults of the system, injected into every call on a file that this pack makes: `preload.cpp` and the process that runs it."""
