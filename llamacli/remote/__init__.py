"""The client's side of a server: asks it, and reads what it says."""
