"""Files, directories and web pages as text. Knows neither models nor what is asked of a text."""
