"""What something is, holds or will cost; nothing is changed here."""
