"""How the bundled tiny model was made: generated conversations, a small transformer, a GGUF file."""
