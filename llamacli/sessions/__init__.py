"""Conversations that are kept: what was asked and answered, to be searched and gone on with. Knows no terminals."""
