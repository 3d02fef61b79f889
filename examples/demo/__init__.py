"""`python -m examples.demo`: distill a real teacher on real text, in a few minutes on a CPU."""

MARKER = "demo"  # name of the markers around the table in a Markdown file
