"""Inference: a trained network and image files come in; masks and probabilities in each input's own geometry go out."""
