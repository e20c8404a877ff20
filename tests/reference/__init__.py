"""Slow, obvious NumPy versions of the package's mathematics: the second opinion the tests ask."""
