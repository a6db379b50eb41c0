"""Commands at work that use a trained model: evaluate, predict, draw, export."""
