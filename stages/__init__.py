"""The two stages and what they are made of. Knows no command, no path on disk but the one it is handed."""
