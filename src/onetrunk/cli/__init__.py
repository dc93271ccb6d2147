"""The command line: argv -> values -> calls; the only room that prints."""
