"""The one training loop and what it needs: a typed config goes in, a run folder comes out."""
