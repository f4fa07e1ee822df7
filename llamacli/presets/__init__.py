"""Prompts with a name: those of the package and the user's own. Knows neither models nor command lines."""
