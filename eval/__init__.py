"""Evaluation: mean@k, pass@k and maj@k (metrics), one evaluation pass (evaluate), the benchmark runner (run),
the comparison of runs (compare), its curves (plots), the page to look at (view)."""
