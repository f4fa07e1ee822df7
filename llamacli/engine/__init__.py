"""Tokens in, tokens out. Knows nothing of HTTP, terminals or chat."""
