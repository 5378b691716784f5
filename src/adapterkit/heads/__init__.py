"""Heads, whose values are in `config/heads.py`: found (`find`), built (`build`), planned (`plan`) and run (the others)."""
