"""The maths, one term a file: a step goes in, a raw loss comes out. Weights and ramps belong to the recipe."""

from scarceseg.methods.base import METHODS, Term, TermOptions, build_terms, parse_method

__all__ = ["METHODS", "Term", "TermOptions", "build_terms", "parse_method"]
