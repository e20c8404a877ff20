"""Measurements a user can repeat on their own data: a labelled dataset and a model come in, a table and JSON go out.

Here alone a simulator may look at reference labels to place clicks; nothing that trains imports this folder (a test says so).
"""
