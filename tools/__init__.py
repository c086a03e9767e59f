"""For those who maintain the project; run as python -m tools.bench."""
