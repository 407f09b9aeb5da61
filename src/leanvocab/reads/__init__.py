"""What a model's own code reads of its vocabulary matrices, found in its source without running it."""
