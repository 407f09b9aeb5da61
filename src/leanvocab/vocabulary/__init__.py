"""Data become counts, and counts become the kept ids; torch never comes in here."""
