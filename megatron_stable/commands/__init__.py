"""The command line, one file per verb: parse, call, print. Nothing here imports torch before a verb runs."""
