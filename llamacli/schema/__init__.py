"""Answers of a form that a program can read: from JSON schemas to grammars, and back to checked values."""
