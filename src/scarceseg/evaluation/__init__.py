"""Masks -> numbers -> tables.

In: predicted label files and reference label files. Out: Dice, Jaccard, ASD, ASSD and HD95 of every case and class
(`metrics`: two masks; `evaluate`: folders of them; `result`: the JSON form), and their tables on screen, in CSV and in
Markdown beside the published figures (`tables`). In: finished runs. Out: mean and spread over seeds, paired tests and the
published rows (`compare`).
"""
