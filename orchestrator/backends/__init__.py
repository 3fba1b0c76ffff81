"""Where the ranks of a run live: this machine's processes, or the actors of a Ray cluster."""
