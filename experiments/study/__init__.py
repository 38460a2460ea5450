"""Does it rank better? Data sets, the protocol and its records; `question` is the command."""
