"""study: a named grid of configs over seeds, each trained once, and one table of what came out."""
