"""Reports on what something is, or will cost; nothing is changed here."""
