"""Evaluation: mean@k, pass@k and maj@k (metrics), one evaluation pass (evaluate), the benchmark runner (run) and which
policy of a run it means (trained), runs read from disk (records), their comparison (compare), its curves (plots), the
page to look at (view)."""
