"""Bytes in files: nothing that is read is trusted, nothing that is written is ever half there."""
