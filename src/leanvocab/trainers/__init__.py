"""Trainers of transformers, TRL and sentence-transformers: one line that shrinks, a callback, and going on from deltas."""
