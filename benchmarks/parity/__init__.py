"""Number by number, the same adapters in adapterkit and in the libraries that people use today.

`families.py` builds tiny models and their inputs, `peer.py` adapts a copy of one with the other library, `compare.py`
copies the weights over and measures, `explained.py` puts right what is wrong in the other library, `table.py` writes
the page for the docs. That is of the presets of bottlenecks; `methods/` is of every other method, and
`compositions/` of adapters that act together.
"""
