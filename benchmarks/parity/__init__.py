"""Number by number, the same adapters in adapterkit and in a library that people use today.

`families.py` builds tiny models and their inputs, `peer.py` adapts a copy of one with the other library, `compare.py`
copies the weights over and measures, `explained.py` puts right what is wrong in the other library, `table.py` writes
the table for the docs.
"""
