"""A live model is shrunk, watched and merged; what was refused leaves it as it was."""
