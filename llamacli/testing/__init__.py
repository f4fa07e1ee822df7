"""For those who test a client of the Llama 2 API: a pytest fixture over a real server."""
