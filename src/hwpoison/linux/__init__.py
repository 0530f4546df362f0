"""The real machine: Linux, from 5.19, unprivileged or root."""
