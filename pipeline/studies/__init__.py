"""study: a named grid of configs and seeds, each trained once, and one table of the results."""
