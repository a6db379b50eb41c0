"""mae-scale: Masked Autoencoders (He et al., arXiv 2111.06377) from ViT-B to ViT-H on clusters."""

__version__ = "0.1.0"
