"""How fast it is, as ratios within one run; `scripts/benchmark.py` is the command."""
