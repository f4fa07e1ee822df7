"""Which file is meant, and is it whole?"""
