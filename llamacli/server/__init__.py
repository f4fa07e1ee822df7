"""The HTTP server, the keys that open it, and what each key has used."""
