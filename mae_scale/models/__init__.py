"""The masked autoencoder, the classifier on its encoder, and their parts."""

from mae_scale.models.classifier import Classifier, build_classifier
from mae_scale.models.mae import MODELS, MaskedAutoencoderViT, build_mae

__all__ = ["MODELS", "Classifier", "MaskedAutoencoderViT", "build_classifier", "build_mae"]
