"""Networks: a patch ``[B, C, X, Y, Z]`` comes in, logits ``[B, K, X, Y, Z]`` go out."""

from scarceseg.networks.base import NETWORKS, EncoderDecoder, SegmentationNetwork, build_network, divisor_of

__all__ = ["NETWORKS", "EncoderDecoder", "SegmentationNetwork", "build_network", "divisor_of"]
