"""Texts in files and data sets → tokens: reading, columns, chats, and the packing of rows."""
