"""The manager process: the core on a real machine, behind a socket."""
