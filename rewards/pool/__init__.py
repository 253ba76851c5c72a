"""Grading in worker processes with time and memory limits.

verifier.py: process pool. process.py: handle of one worker process. worker.py: main program of a worker. own.py: a
user's reward function in a worker.
"""
