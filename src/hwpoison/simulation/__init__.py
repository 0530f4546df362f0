"""The second machine, of plain Python: where every interleaving of the core with the world can be met."""
