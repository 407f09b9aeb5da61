"""Doors: every trainer and every memory saver that people use, run with leanvocab and without, and compared.

`python -m doors` runs the combinations and writes docs/composability.md from what it measured.
"""
