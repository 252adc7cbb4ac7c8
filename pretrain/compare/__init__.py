"""Side-by-side comparison of tracked runs: a table, runs.json, curves.png and a self-contained index.html.

python -m pretrain.compare --experiment quickstart --output report/
"""
