"""Every method, number by number, in adapterkit, in the libraries that people use today, and from the papers' formulas.

`hosts.py` builds tiny models and `cases.py` lists what is compared. `adapters_peer.py`, `peft_peer.py` and `ours.py` adapt
a copy of a model each, with the same tensors, which `draw.py` draws and `own_tensors.py` finds in ours. `formula.py`
computes the same in float64 straight from the papers, `known.py` says where a peer is wrong and why, and `theirs.py` proves
it. `run.py` measures, `outcome.py` judges, `places.py` compares where presets go, `table.py` writes it down for the docs.
"""
