"""One vocabulary matrix while it is partial: its rows, its lookup, its states; no model is known here."""
