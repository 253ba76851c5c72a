"""Mathematics as text: is this final answer equal to the gold? Strings in, a verdict out, no process.

extract.py finds the final answers, normalize.py gives them one spelling, guards.py refuses what is too large, parts.py
takes them apart (exact.py: numbers; units.py; regions.py: sets of reals), compare.py compares kind by kind,
arithmetic.py finds work left undone, echo.py answers copied from the problem, symbolic.py compares expressions by
computer algebra (imported only by a worker). golds.py checks gold answers, answer_line.py is the paper's strict rule.
"""
