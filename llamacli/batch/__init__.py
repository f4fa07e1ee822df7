"""A file of prompts in, a file of answers out: in the order of the input, whatever interrupts it."""
