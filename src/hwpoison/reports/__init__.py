"""How the manager learns that a page is bad: one file for each source."""
