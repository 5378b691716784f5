"""Compositions, number by number, in adapterkit, in the `adapters` library, and by the formula.

`cases.py` lists what is compared. `peer.py` and `ours.py` have the same three adapters in a copy of a model each, and the
same fusion; `formula.py` computes a composition in float64 from its definition, row by row, and with a fault in it what the
library makes of it; `known.py` says which faults, `run.py` measures and judges, `table.py` writes it down for the docs.
"""
