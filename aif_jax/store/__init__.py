"""What is written to folders and how it is named: atomic folders and files, locks, versions, rows of snapshots."""
