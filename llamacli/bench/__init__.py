"""The user's own benchmark: how fast a model is here, and other programs beside it. Knows no terminal."""
