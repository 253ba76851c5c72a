"""Comparison of a final answer with the gold. Functions of strings, without processes.

extract.py      finds the final answers of a completion       normalize.py    canonical spelling
guards.py       size limits                                   parts.py        structure of an answer
exact.py        exact numbers                                 units.py        units of measure
regions.py      sets of real numbers                          compare.py      comparison by kind of value
arithmetic.py   unevaluated arithmetic                        echo.py         answers copied from the problem
symbolic.py     computer algebra, imported only by workers    golds.py        checks of gold answers
grade.py        verdict and reward                            answer_line.py  the paper's strict rule
"""
