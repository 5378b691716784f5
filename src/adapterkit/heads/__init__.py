"""Heads: settings (`config`), found in a model (`find`), built (`build`), planned (`plan`) and run (the others)."""
