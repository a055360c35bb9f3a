"""The two stages and their parts. Independent of commands; paths on disk are always passed in."""
