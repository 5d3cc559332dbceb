"""``distprune report``: a page about a run, or about several side by side."""
