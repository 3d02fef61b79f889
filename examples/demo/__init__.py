"""`python -m examples.demo`: distil a real teacher on real text in a few minutes on a CPU."""

MARKER = "demo"  # of the table in a Markdown file
