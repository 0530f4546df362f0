"""The logic of memory-failure recovery. It imports no operating system: all it does goes through `core.machine`."""
