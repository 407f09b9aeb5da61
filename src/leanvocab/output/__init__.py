"""An output layer over partial rows, and its loss; all logits never stand in memory at once here."""
