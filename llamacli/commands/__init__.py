"""The doors for people at a shell: parse, build objects, call one function, report."""
