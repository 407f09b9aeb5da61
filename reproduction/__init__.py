"""The paper's tables and its Figure 2, cell by cell: what is published beside what is measured here.

`python -m reproduction --help` lists the commands. In the order in which the data flows:

paper.py       what was published: tables, models, tasks
sources.py     where data, tokenizers, configs and models come from: the hub, or folders
counting.py    texts → token counts, as the paper tokenizes
sizes.py       configs → parameters, full and partial
cells.py       a published number beside a measured one, and what can be said about the two
bench.py       what all tables are made with
reductions.py  Tables 2, 3 and 4
inventory.py   Tables 5 to 8
unused.py      Table 1
heaps.py       Figure 2
training.py    Tables 9 and 10
evidence.py    what does not fit together in the paper, or could be taken otherwise, with numbers
grid.py        cells → a table in the paper's layout, on a terminal and in Markdown
report.py      everything → REPORT.md
cli.py         the commands

Source: Miles Williams and Nikolaos Aletras, Vocabulary-level Memory Efficiency for Language Model Fine-tuning.
"""
