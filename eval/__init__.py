"""Evaluation of policies and comparison of runs.

metrics: mean@k, pass@k and maj@k. evaluate: one evaluation pass. run: benchmark runner. records: runs read from disk.
compare: tables and tests. plots: curves. sweep: grids of runs. report: HTML page.
"""
