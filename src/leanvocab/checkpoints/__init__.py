"""Full and delta checkpoints, and merging them on disk; merging never loads torch."""
