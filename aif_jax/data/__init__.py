"""Schema and events, readers of public data sets, a synthetic world."""
