"""Measurements that anyone can run: `python -m benchmarks NAME`. Each says what it measures, beside whom, and the limit."""
