"""A checkpoint and its tokenizer with the kept rows alone, for good: what is kept splits and computes as it did."""
