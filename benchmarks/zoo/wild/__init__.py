"""The wild zoo: models that a small grammar puts together of parts, whose right places are known by construction.

`spec` names the parts, `build` assembles a model of them, `truth` says what a preset or a role must do there, `judge` asks
adapterkit and compares. `python -m benchmarks.zoo --catalogue wild_models` runs it.
"""
