"""Standing suites: kills, storm, fuzz, soak, chaos. Marker `reliability`; a small form of some runs always."""
