"""A checkpoint and its tokenizer with the kept rows alone, for good. What is kept splits, and computes, as it did; no model is built."""
