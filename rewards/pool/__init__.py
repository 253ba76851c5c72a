"""Grading in worker processes that can be stopped: verifier.py owns them, process.py is one of them as its owner sees
it, worker.py what runs inside, own.py a user's function there.
"""
