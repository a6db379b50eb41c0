"""The masked autoencoder and its parts: masking, targets, position embeddings."""

from mae_scale.models.mae import MODELS, MaskedAutoencoderViT, build_mae

__all__ = ["MODELS", "MaskedAutoencoderViT", "build_mae"]
