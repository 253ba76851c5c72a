"""Evaluation: mean@k, pass@k and maj@k (metrics), one evaluation pass (evaluate), the benchmark runner (run), runs read
from disk (records), their comparison (compare), curves (plots), grids of runs (sweep), the HTML page (report)."""
