"""Every method, number by number, in adapterkit, in the libraries that people use today, and from the papers' formulas.

`hosts.py` builds tiny models, `cases.py` lists what is compared, `adapters_peer.py` and `peft_peer.py` adapt a copy of a
model, `formula.py` computes the same in float64 straight from the papers, `known.py` says where a peer is wrong and why,
`run.py` measures and judges, `page.py` writes the table for the docs.
"""
