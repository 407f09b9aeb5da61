"""`make demo`: fine-tune a real model on real labelled text twice, with the full and a partial vocabulary, and compare.

Without a model hub: the model (all-MiniLM-L6-v2, Apache 2.0) and the text (10,605 movie review snippets, each with the
mean of about 15 people's ratings from -4 to 4; Hutto & Gilbert, ICWSM 2014, MIT) are taken from packages of PyPI.
"""
