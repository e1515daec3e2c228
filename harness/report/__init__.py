"""What became of a run, from its URL alone: numbers, a few lines for the terminal, a page for the browser."""
