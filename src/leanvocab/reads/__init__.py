"""What a model's own code makes, and reads of its vocabulary matrices, found in its source without running it."""
